// Talks to the server of this page: its model, and completions as they are written.

export class Problem extends Error {}

const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

async function ask(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is dlm serve still running?");
  }
}

// The reason of an answer that is no success, in words.
async function reason(answer) {
  let said = "";
  try { said = (await answer.json()).error.message; } catch { /* it is not in OpenAI's shape */ }
  if (answer.status === 401) return "The server asks for an API key: give it under Settings.";
  if (answer.status === 429 || answer.status === 503) {
    const wait = answer.headers.get("Retry-After");
    return `The server is busy${said ? ` (${said})` : ""}. Try again${wait ? ` in ${wait} s` : " in a moment"}.`;
  }
  return said || `The server answered with status ${answer.status}.`;
}

// What the server says of its model: id, chat (whether it answers), and more. Throws Problem.
export async function model(key) {
  const answer = await ask("v1/models", { headers: headers(key) });
  if (!answer.ok) throw Object.assign(new Problem(await reason(answer)), { status: answer.status });
  return (await answer.json()).data[0];
}

// The events of a streamed completion, or with `messages` of a chat's answer, one object each. Throws Problem; AbortError
// once `signal` says stop.
export async function* complete(body, key, signal) {
  const answer = await ask(body.messages ? "v1/chat/completions" : "v1/completions", { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
  if (!answer.ok) throw Object.assign(new Problem(await reason(answer)), { status: answer.status });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      part = { done: true };
    }
    if (part.done) throw new Problem("The connection broke before the text was finished.");
    const events = (rest + part.value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (!data) continue; // a comment that keeps the connection open
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw new Problem(content.error.message || "The server could not finish the text.");
      yield content;
    }
  }
}
