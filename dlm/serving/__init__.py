"""A checkpoint -> an HTTP server that speaks OpenAI's protocol: many requests denoised together, none mixed up."""
