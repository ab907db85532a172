// The one colour scale of confidence: of this page, and of the pages that dlm replay --html writes.

// A background for a confidence from 0 (red, strong) to 1 (green, faint); --l, its lightness, is the theme's. The
// strength differs too, for eyes that see red and green alike.
export const hue = (sure) => `hsl(${8 + 122 * sure} 65% var(--l) / ${(0.75 - 0.35 * sure).toFixed(3)})`;

// A confidence as a number from 0 to 1; kind: the rule that gave it.
export const sureness = (confidence, kind) => Math.max(0, Math.min(1, kind === "entropy" ? Math.exp(Math.min(confidence, 0)) : confidence));
