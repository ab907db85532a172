// What every pass changed, so that any of them can be shown again.

// slots: the state that is shown, {text (null: masked), sure, pass, changes} each; passes: what each one changed;
// at: how many passes are shown.
export class History {
  constructor() {
    this.slots = [];
    this.passes = [];
    this.at = 0;
    this.newest = []; // the state after the last pass
  }

  // Notes a pass: {pieces, confidence, committed}, as the server sends it.
  add({ pieces, confidence = [], committed = [] }) {
    const number = this.passes.length + 1, written = new Set(committed), changes = [];
    pieces.forEach((text, slot) => {
      const before = this.newest[slot];
      if (before && before.text === text && !written.has(slot)) return;
      const again = before && before.text !== null ? 1 : 0;
      const touched = before !== undefined || written.has(slot); // else it was given, or masked from the start
      const after = { text, sure: confidence[slot] ?? null, pass: touched ? number : 0, changes: (before?.changes ?? 0) + again };
      changes.push({ slot, before, after });
      this.newest[slot] = after;
    });
    this.passes.push(changes);
  }

  // Shows the state after `pass` passes; returns the slots whose looks may have changed.
  go(pass) {
    const touched = new Set(), last = Math.max(0, Math.min(pass, this.passes.length));
    const mark = () => this.at && this.passes[this.at - 1].forEach(({ slot }) => touched.add(slot));
    mark();
    while (this.at < last) for (const { slot, after } of this.passes[this.at++]) { this.slots[slot] = after; touched.add(slot); }
    while (this.at > last) for (const { slot, before } of [...this.passes[--this.at]].reverse()) {
      this.slots[slot] = before ?? { text: null, sure: null, pass: 0, changes: 0 };
      touched.add(slot);
    }
    mark();
    return touched;
  }

  get written() { return this.newest.filter((slot) => slot.text !== null).length; }
  get text() { return this.newest.map((slot) => slot.text ?? "").join(""); }
}
