// The page: reads the form, asks the server, draws each pass, and looks back over them.

import { Drawing } from "./canvas.js";
import { Problem, complete, model } from "./client.js";
import { History } from "./history.js";
import { hue } from "./scale.js";

const $ = (id) => document.getElementById(id);
const drawing = new Drawing($("canvas"), $("tip"));
const wide = matchMedia("(min-width: 60rem)"); // the canvas lies beside the form
let history = new History(), name = "", chosen = null, running = null, playing = null, done = "", typed = false;

const EXAMPLES = {
  story: { text: "Once upon a time" },
  order: { text: "Once upon a time", length: 96, method: "none", block: 48, commit: "threshold", threshold: 0.4 },
  middle: { text: "Tom saw a dog. The dog was sad. Then they went home and were happy.", select: "The dog was sad.", blank: 24 },
  json: {
    text: "A hero of a story, as JSON: ", length: 48,
    schema: { type: "object", properties: { name: { type: "string", maxLength: 12 }, animal: { enum: ["fox", "cat", "dog"] }, brave: { type: "boolean" } }, required: ["name", "animal", "brave"] },
  },
};

// ---------------------------------------------------------------- what is asked

// A number of the form, undefined where the field is empty. Throws Problem in the words of its label.
function number(id) {
  const field = $(id), label = document.querySelector(`label[for=${id}]`).textContent;
  if (field.validity.badInput) throw field.focus(), new Problem(`${label}: this is no number.`);
  if (field.value === "") return undefined;
  if (field.validity.valid) return Number(field.value);
  field.focus();
  throw new Problem(`${label} is ${field.value}: ${field.validationMessage || "this does not fit."}`);
}

// The fields of a request that the settings give.
function settings() {
  const asked = { temperature: number("temperature"), seed: number("seed") ?? Math.floor(Math.random() * 2 ** 31) };
  if ($("method").value) asked.method = $("method").value;
  asked.block_length = number("block");
  const commit = $("commit").value;
  if (commit) asked.commit = commit;
  if (commit === "quota") asked.steps = number("steps");
  if (commit === "threshold") asked.threshold = number("threshold");
  const schema = $("schema").value.trim();
  if (schema) {
    try { JSON.parse(schema); } catch (error) { $("schema").focus(); throw new Problem(`The JSON schema is not JSON: ${error.message}`); }
    asked.json_schema = schema;
  }
  return asked;
}

// ---------------------------------------------------------------- a run

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function busy(on) {
  $("write").disabled = $("fill").disabled = on;
  $("stop").disabled = !on;
  $("use").disabled = $("copy").disabled = on || !history.passes.length;
  $("play").disabled = $("pass").disabled = !history.passes.length;
}

// Writes between two texts; `after` is null where the text goes on.
async function run(before, after, length) {
  let body;
  if (!name && !(await connect())) return;
  try {
    body = { model: name, max_tokens: length, stream: true, stream_canvas: true, stream_options: { include_usage: true }, ...settings() };
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    $("settings").open = true;
    return problem(error.message);
  }
  if (!wide.matches) $("settings").open = false; // the canvas lies below them
  if (after !== null) body.suffix = after;
  if (after === null && $("chat").checked) {
    body.messages = [{ role: "user", content: before }];
    before += "\n\n";
  } else body.prompt = before;
  problem("");
  pause();
  choose(null);
  history = new History();
  done = "";
  drawing.begin(before, after ?? "", history);
  running = new AbortController();
  const began = performance.now();
  let usage, written = "";
  $("said").textContent = "Writing.";
  $("stats").textContent = "waiting for the first pass ...";
  busy(true);
  $("canvas").scrollIntoView({ block: "nearest" });
  let end = "Stopped"; // then what stands on the canvas is all there is
  try {
    for await (const event of complete(body, $("key").value, running.signal)) {
      if (event.canvas) follow(event.canvas, began);
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      written += choice?.text ?? choice?.delta?.content ?? "";
    }
    end = "Finished";
  } catch (error) {
    if (error.name !== "AbortError") {
      if (error.status === 401) $("key").hidden = $("key-label").hidden = !($("settings").open = true);
      problem(error instanceof Problem ? error.message : `This page failed: ${error.message}`);
      end = "Not finished";
    }
  }
  running = null;
  busy(false);
  look(history.passes.length);
  done = before + (end === "Finished" ? written : history.text) + (after ?? "");
  $("stats").textContent = summary((performance.now() - began) / 1000, usage, body.seed);
  $("said").textContent = `${end} after ${counted(history.passes.length, "pass")}: ${done}`;
  if (document.activeElement === document.body) (after === null ? $("write") : $("fill")).focus();
}

// Notes a pass, and shows it where the slider stands at the end.
function follow(canvas, began) {
  const newest = Number($("pass").value) >= Number($("pass").max);
  history.add(canvas);
  $("pass").max = history.passes.length;
  if ($("pass").disabled) $("pass").disabled = $("play").disabled = false;
  look(newest ? history.passes.length : Number($("pass").value));
  $("stats").textContent = summary((performance.now() - began) / 1000);
}

const counted = (count, what) => `${count} ${what}${count === 1 ? "" : what.endsWith("s") ? "es" : "s"}`;

// Passes, tokens, tokens a second.
function summary(seconds, usage, seed) {
  const passes = usage?.nfe ?? history.passes.length, tokens = history.written;
  if (!passes) return "nothing was written";
  const parts = [counted(passes, "pass"), counted(tokens, "token"), `${(tokens / passes).toFixed(1)} tokens a pass`];
  parts.push(`${Math.round(tokens / Math.max(seconds, 0.001))} tokens a second`, `${seconds.toFixed(1)} s`);
  if (seed !== undefined) parts.push(`seed ${seed}`);
  return parts.join(" · ");
}

// ---------------------------------------------------------------- looking back

function look(pass) {
  const count = history.passes.length;
  drawing.draw(pass);
  $("pass").max = count;
  $("pass").value = pass;
  const words = count ? `pass ${pass} of ${count}` : "no pass yet";
  $("count").textContent = words;
  $("pass").setAttribute("aria-valuetext", words);
}

function pause() {
  clearInterval(playing);
  playing = null;
  $("play").textContent = "Play";
}

function play() {
  if (playing) return pause();
  if (Number($("pass").value) >= history.passes.length) look(0);
  $("play").textContent = "Pause";
  playing = setInterval(() => {
    look(Math.min(Number($("pass").value) + 1, history.passes.length));
    if (Number($("pass").value) >= history.passes.length && !running) pause();
  }, 120);
}

// ---------------------------------------------------------------- what is selected

// Keeps white space at the ends of a selection outside of it: a word is written with the space before it.
function trimmed({ before, middle, after }) {
  const inner = middle.trim();
  if (!inner) return null;
  const start = middle.indexOf(inner);
  return { before: before + middle.slice(0, start), middle: inner, after: middle.slice(start + inner.length) + after };
}

// Takes what is selected, {before, middle, after} or null, as what Fill rewrites.
function choose(selection) {
  chosen = selection && trimmed(selection);
  if (chosen && !typed) $("blank").value = Math.max(1, Math.ceil(chosen.middle.length / 4)); // about a token in 4 letters
  const words = chosen && (chosen.middle.length > 40 ? `${chosen.middle.slice(0, 38)}…` : chosen.middle);
  $("chosen").textContent = chosen ? `Selected: “${words}”` : "Nothing is selected.";
}

function notice() {
  const box = $("text"), { value, selectionStart: from, selectionEnd: to } = box;
  if (document.activeElement === box) {
    choose(from < to ? { before: value.slice(0, from), middle: value.slice(from, to), after: value.slice(to) } : null);
  } else if (!running) {
    const selection = drawing.selected();
    if (selection && selection.before + selection.middle + selection.after === done) choose(selection); // all of it stands on the canvas
  }
}

function fill() {
  if (!chosen) return problem("Select the words to rewrite first, in the text or in the canvas.");
  let length;
  try { length = number("blank") ?? 8; } catch (error) { return problem(error.message); }
  return run(chosen.before, chosen.after, length);
}

function example(which) {
  const { text, select, blank, schema, ...more } = EXAMPLES[which];
  const fields = { length: "", method: "", block: "", commit: "", threshold: 0.9, ...more };
  for (const [field, value] of Object.entries(fields)) $(field).value = value;
  shown();
  $("text").value = text;
  $("schema").value = schema ? JSON.stringify(schema, null, 1) : "";
  if (schema && wide.matches) $("settings").open = true;
  problem("");
  $("text").focus();
  if (select) {
    $("text").setSelectionRange(text.indexOf(select), text.indexOf(select) + select.length);
    notice();
    $("blank").value = blank;
    $("fill").focus();
  } else {
    $("text").setSelectionRange(text.length, text.length);
    $("write").focus();
  }
}

// ---------------------------------------------------------------- the controls

function shown() {
  for (const element of document.querySelectorAll("[data-with]")) element.hidden = element.dataset.with !== $("commit").value;
}

// Asks for the model's name; whether there is one.
async function connect() {
  try {
    const card = await model($("key").value);
    name = $("model").textContent = card.id;
    $("chat-line").hidden = !card.chat;
    problem("");
  } catch (error) {
    if (error.status === 401) $("key").hidden = $("key-label").hidden = !($("settings").open = true);
    $("model").textContent = "not connected";
    problem(error.message);
  }
  return name !== "";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  let length;
  try { length = number("length"); } catch (error) { $("settings").open = true; return problem(error.message); }
  run($("text").value, null, length);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
});
$("form").noValidate = true; // the page says itself what does not fit
$("fill").addEventListener("click", fill);
$("stop").addEventListener("click", () => running?.abort());
$("play").addEventListener("click", play);
$("pass").addEventListener("input", () => { pause(); look(Number($("pass").value)); });
$("commit").addEventListener("change", shown);
$("blank").addEventListener("input", () => { typed = $("blank").value !== ""; });
$("key").addEventListener("change", connect);
$("use").addEventListener("click", () => { $("text").value = done; $("text").focus(); $("text").setSelectionRange(done.length, done.length); });
$("copy").addEventListener("click", async () => {
  try { await navigator.clipboard.writeText(done); $("said").textContent = "Copied."; $("copy").textContent = "Copied"; setTimeout(() => { $("copy").textContent = "Copy"; }, 1500); }
  catch { problem("The browser does not let this page copy: select the text in the canvas."); }
});
document.addEventListener("selectionchange", notice);
for (const button of document.querySelectorAll("[data-example]")) button.addEventListener("click", () => example(button.dataset.example));
document.querySelectorAll(".scale i").forEach((box, i, all) => { box.style.background = hue(i / (all.length - 1)); });
$("settings").open = wide.matches;
shown();
connect();
