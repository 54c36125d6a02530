// Long lists of which only the visible rows are drawn.
"use strict";

const ROW_PIXELS = 24;
const SPARE_ROWS = 8;
// Browsers limit the height of an element; lists that would be higher scroll several rows at a time.
const MOST_PIXELS = 8_000_000;

/** A list in a scrolling box. `render(item, element)` fills the element of a row; a click on it chooses the row. */
class Rows {
  constructor(box, render, onScroll) {
    this.box = box;
    this.render = render;
    this.onScroll = onScroll;
    this.items = [];
    this.active = -1; // the row that keys move, or -1
    this.drawn = new Map();
    this.inner = document.createElement("div");
    this.inner.className = "inner";
    box.append(this.inner);
    box.addEventListener("keydown", (event) => this.press(event));
    box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(box);
  }

  get height() {
    return Math.min(this.items.length * ROW_PIXELS, MOST_PIXELS);
  }

  /** Show these items, from the top unless `keep`. */
  show(items, keep = false) {
    this.items = items;
    this.active = -1;
    this.inner.style.height = `${this.height}px`;
    if (!keep) this.box.scrollTop = 0;
    this.redraw();
  }

  /** Fill all visible rows again. */
  redraw() {
    for (const element of this.drawn.values()) element.remove();
    this.drawn.clear();
    this.draw();
  }

  /** Return the first visible row, with a fraction. */
  get first() {
    const room = this.height - this.box.clientHeight;
    if (this.items.length * ROW_PIXELS <= MOST_PIXELS || room <= 0) return this.box.scrollTop / ROW_PIXELS;
    return (this.box.scrollTop / room) * (this.items.length - this.box.clientHeight / ROW_PIXELS);
  }

  /** Return the first row, and the row after the last, that can be seen. */
  visible() {
    const count = this.box.clientHeight / ROW_PIXELS;
    return [Math.max(0, Math.floor(this.first)), Math.min(this.items.length, Math.ceil(this.first + count))];
  }

  draw() {
    const [start, stop] = this.visible();
    const from = Math.max(0, start - SPARE_ROWS);
    const to = Math.min(this.items.length, stop + SPARE_ROWS);
    for (const [row, element] of this.drawn) {
      if (row < from || row >= to) {
        element.remove();
        this.drawn.delete(row);
      }
    }
    for (let row = from; row < to; row++) {
      let element = this.drawn.get(row);
      if (!element) {
        element = document.createElement("div");
        element.className = "row";
        element.id = `${this.box.id}-${row}`;
        element.role = "option";
        element.ariaPosInSet = row + 1;
        element.ariaSetSize = this.items.length;
        element.ariaSelected = "false";
        element.addEventListener("click", () => (this.active = row));
        this.render(this.items[row], element);
        this.drawn.set(row, element);
        this.inner.append(element);
      }
      element.classList.toggle("active", row === this.active);
      element.style.top = `${this.box.scrollTop + this.yOf(row)}px`;
    }
    if (this.drawn.has(this.active)) this.box.setAttribute("aria-activedescendant", `${this.box.id}-${this.active}`);
    else this.box.removeAttribute("aria-activedescendant");
    this.onScroll();
  }

  /** Move the active row by keys; Enter chooses it. */
  press(event) {
    const [start, stop] = this.visible();
    const page = Math.max(1, stop - start - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key === "Enter") this.drawn.get(this.active)?.click();
    if (!(event.key in steps) || !this.items.length) return;
    event.preventDefault();
    const from = this.active < 0 ? start - 1 : this.active;
    this.active = Math.max(0, Math.min(this.items.length - 1, from + steps[event.key]));
    this.reveal(this.active);
    this.draw();
  }

  /** Return the distance of a row from the top of the box, in pixels. */
  yOf(row) {
    return (row - this.first) * ROW_PIXELS;
  }

  /** Scroll so that a row is in the middle, unless it can be seen. */
  reveal(row) {
    const [start, stop] = this.visible();
    if (row > start && row < stop - 1) return;
    if (stop - start >= this.items.length) return;
    const count = this.box.clientHeight / ROW_PIXELS;
    const first = Math.max(0, Math.min(row - count / 2, this.items.length - count));
    const room = this.height - this.box.clientHeight;
    const scrolls = this.items.length * ROW_PIXELS <= MOST_PIXELS;
    this.box.scrollTop = scrolls ? first * ROW_PIXELS : (first / (this.items.length - count)) * room;
    this.draw();
  }
}
