// Draws a canvas: what is given, and the slots between, coloured by confidence.

import { hue, sureness } from "./scale.js";

const show = (text) => JSON.stringify(text).slice(1, -1);

// box: the element to draw into; tip: the element that tells about one token.
export class Drawing {
  constructor(box, tip) {
    this.box = box;
    this.tip = tip;
    this.spans = [];
    this.pass = 0;
    box.addEventListener("pointermove", (event) => this.tell(event.target));
    box.addEventListener("pointerleave", () => this.tell(null));
    box.addEventListener("focusin", (event) => this.tell(event.target));
    box.addEventListener("focusout", () => this.tell(null));
    box.addEventListener("keydown", (event) => this.step(event));
  }

  // Begins anew with the texts around the slots, and the history that they follow.
  begin(before, after, history) {
    const part = (text) => Object.assign(document.createElement("span"), { className: "given", textContent: text });
    this.end = part(after);
    this.history = history;
    this.spans = [];
    this.box.replaceChildren(part(before), this.end);
  }

  // Shows the state after `pass` passes.
  draw(pass) {
    const touched = this.history.go(pass);
    this.pass = this.history.at;
    for (let slot = this.spans.length; slot < this.history.slots.length; slot++) {
      const span = Object.assign(document.createElement("span"), { tabIndex: -1, place: slot });
      this.spans.push(span);
      this.end.before(span);
      touched.add(slot);
    }
    for (const slot of touched) this.paint(this.spans[slot], this.history.slots[slot]);
  }

  paint(span, { text, sure, pass }) {
    const masked = text === null;
    span.className = masked ? "masked" : pass === 0 ? "given" : pass === this.pass ? "t new" : "t";
    span.textContent = text ?? "";
    span.style.background = masked || sure === null || pass === 0 ? "" : hue(sureness(sure, sure < 0 ? "entropy" : "probability"));
  }

  // Tells about the token of an element, or about none.
  tell(span) {
    const slot = this.history?.slots[span?.place];
    this.tip.hidden = !slot;
    if (!slot) return;
    const { text, sure, pass, changes } = slot;
    const how = sure === null ? "" : `, confidence ${sure.toFixed(3)}`;
    const words = text === null ? "masked" : pass === 0 ? `"${show(text)}"  given` : `"${show(text)}"  pass ${pass}${how}`;
    this.tip.textContent = words + (changes ? `\nchanged ${changes} time${changes > 1 ? "s" : ""}` : "");
    const box = span.getBoundingClientRect(), { offsetWidth: width, offsetHeight: height } = this.tip;
    this.tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - width - 8))}px`;
    this.tip.style.top = `${box.bottom + 6 + height < innerHeight ? box.bottom + 6 : box.top - height - 6}px`;
    span.setAttribute("aria-describedby", this.tip.id);
  }

  // Arrow keys go from token to token, Home and End to the first and the last, Escape back to the canvas.
  step(event) {
    const at = event.target.place ?? -1, last = this.spans.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last, Escape: -2 }[event.key];
    if (to === undefined || event.ctrlKey || event.shiftKey || event.metaKey || event.altKey || last < 0) return;
    event.preventDefault();
    if (to === -2) this.box.focus();
    else this.spans[Math.max(0, Math.min(to, last))].focus();
  }

  // The text on both sides of what is selected in the canvas and the text itself; null where nothing is.
  selected() {
    const chosen = getSelection();
    if (!chosen.rangeCount || chosen.isCollapsed || !this.spans.length) return null;
    const range = chosen.getRangeAt(0);
    if (!this.box.contains(range.commonAncestorContainer)) return null;
    const side = document.createRange();
    side.selectNodeContents(this.box);
    side.setEnd(range.startContainer, range.startOffset);
    const before = side.toString(), middle = range.toString();
    return { before, middle, after: this.box.textContent.slice(before.length + middle.length) };
  }
}
