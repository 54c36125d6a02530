// A picture of a tensor: two of its dimensions as a matrix, the others at an index; zoomed by wheel, moved by dragging.
"use strict";

// Cells that are computed at most for a picture.
const MOST_ACROSS = 320;
const MOST_DOWN = 200;

/** A canvas that shows two dimensions of a tensor. `colorAt(element)` returns [r, g, b]. */
class Matrix {
  constructor(holder, { onHover, onPick }) {
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.role = "application";
    this.controls = document.createElement("div");
    this.controls.className = "controls";
    holder.replaceChildren(this.controls, this.canvas);
    this.onHover = onHover;
    this.onPick = onPick;
    this.shape = null;
    this.mark = null;
    this.drag = null;
    this.canvas.addEventListener("wheel", (event) => this.zoom(event), { passive: false });
    this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    this.canvas.addEventListener("pointerup", (event) => this.release(event));
    this.canvas.addEventListener("pointerleave", () => this.drag || this.onHover(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("dblclick", () => this.fit());
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  /** Show a tensor; `outline` draws over it in the coordinates of a cell. */
  show(shape, colorAt, label, outline = null) {
    const isNew = this.shape === null || this.shape.join() !== shape.join();
    this.shape = shape;
    this.full = shape.length === 0 ? [1, 1] : shape.length === 1 ? [1, ...shape] : shape;
    this.strides = stridesOf(this.full);
    this.colorAt = colorAt;
    this.cells = null; // the cells as they were drawn last
    this.outline = outline;
    this.canvas.setAttribute("aria-label", label);
    if (isNew) {
      this.axes = [this.full.length - 2, this.full.length - 1];
      this.fixed = this.full.map(() => 0);
      this.addControls();
      this.fit();
    }
    this.draw();
  }

  /** Choose the index of the dimensions that are not shown, and mark an element. */
  markElement(element) {
    this.mark = element;
    if (element !== null) {
      indexOf(element, this.full).forEach((at, dim) => (this.fixed[dim] = at));
      this.showFixed();
    }
    this.draw();
  }

  addControls() {
    this.controls.replaceChildren();
    const dims = this.full.length;
    if (this.shape.length < 3) return;
    const choose = document.createElement("select");
    choose.ariaLabel = "Dimensions of the picture";
    for (let down = 0; down < dims; down++) {
      for (let across = down + 1; across < dims; across++) {
        choose.append(new Option(`dim ${down} down, dim ${across} across`, `${down},${across}`));
      }
    }
    choose.value = this.axes.join();
    choose.addEventListener("change", () => {
      this.axes = choose.value.split(",").map(Number);
      this.showFixed();
      this.fit();
      this.draw();
    });
    this.controls.append(choose);
    this.inputs = this.full.map((size, dim) => {
      const label = document.createElement("label");
      const input = document.createElement("input");
      Object.assign(input, { type: "number", min: 0, max: size - 1, value: this.fixed[dim] });
      input.addEventListener("input", () => {
        if (input.value === "") return;
        this.fixed[dim] = Math.max(0, Math.min(size - 1, Math.floor(+input.value || 0)));
        const index = indexOf(this.mark ?? 0, this.full);
        index[dim] = this.fixed[dim];
        this.onPick(distanceOf(index, this.strides));
        this.draw();
      });
      label.append(`dim ${dim} at `, input, ` of ${size}`);
      this.controls.append(label);
      return { label, input };
    });
    this.showFixed();
  }

  showFixed() {
    if (this.shape.length < 3) return;
    this.inputs.forEach(({ label, input }, dim) => {
      label.hidden = this.axes.includes(dim);
      input.value = this.fixed[dim];
    });
  }

  /** Show all of the matrix. */
  fit() {
    this.view = { x: 0, y: 0, width: this.columns, height: this.rows };
    if (this.canvas.clientWidth) this.draw();
  }

  get rows() {
    return this.full[this.axes[0]];
  }

  get columns() {
    return this.full[this.axes[1]];
  }

  /** Return the element of the tensor at a cell of the matrix. */
  elementAt(row, column) {
    const index = [...this.fixed];
    index[this.axes[0]] = row;
    index[this.axes[1]] = column;
    return distanceOf(index, this.strides);
  }

  /** Return the row and column under the pointer, or null. */
  cellAt(event) {
    if (!this.shape) return null;
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor(this.view.x + ((event.clientX - box.left) / box.width) * this.view.width);
    const row = Math.floor(this.view.y + ((event.clientY - box.top) / box.height) * this.view.height);
    return row >= 0 && row < this.rows && column >= 0 && column < this.columns ? [row, column] : null;
  }

  zoom(event) {
    if (!this.shape) return;
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width;
    this.zoomBy(Math.exp(event.deltaY / 300), across, (event.clientY - box.top) / box.height);
  }

  /** Show more or fewer cells around a place, which is given as parts of the width and the height. */
  zoomBy(factor, across, down) {
    const width = Math.max(Math.min(4, this.columns), Math.min(this.columns, this.view.width * factor));
    const height = Math.max(Math.min(4, this.rows), Math.min(this.rows, this.view.height * factor));
    const x = this.view.x + across * (this.view.width - width);
    const y = this.view.y + down * (this.view.height - height);
    this.moveTo(x, y, width, height);
  }

  moveTo(x, y, width, height) {
    this.view = {
      x: Math.max(0, Math.min(x, this.columns - width)),
      y: Math.max(0, Math.min(y, this.rows - height)),
      width,
      height,
    };
    this.draw();
  }

  /** Move the mark by arrow keys, and zoom by plus and minus. */
  key(event) {
    if (!this.shape || this.mark === null || !this.rows || !this.columns) return;
    const { x, y, width, height } = this.view;
    const index = indexOf(this.mark, this.full);
    const [row, column] = this.axes;
    const zooms = { "+": 0.5, "=": 0.5, "-": 2 };
    const moves = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
    if (event.key in zooms) this.zoomBy(zooms[event.key], (index[column] - x) / width, (index[row] - y) / height);
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [down, right] = moves[event.key];
    index[row] = Math.max(0, Math.min(this.rows - 1, index[row] + down));
    index[column] = Math.max(0, Math.min(this.columns - 1, index[column] + right));
    const sees = index[row] >= y && index[row] < y + height && index[column] >= x && index[column] < x + width;
    if (!sees) this.moveTo(index[column] - width / 2, index[row] - height / 2, width, height);
    this.onPick(distanceOf(index, this.strides));
  }

  press(event) {
    this.drag = { x: event.clientX, y: event.clientY, view: this.view, moved: false };
    this.canvas.setPointerCapture(event.pointerId);
  }

  move(event) {
    if (this.drag) {
      const box = this.canvas.getBoundingClientRect();
      const right = event.clientX - this.drag.x;
      const down = event.clientY - this.drag.y;
      this.drag.moved ||= Math.abs(right) + Math.abs(down) > 4;
      const { x, y, width, height } = this.drag.view;
      if (this.drag.moved) this.moveTo(x - (right / box.width) * width, y - (down / box.height) * height, width, height);
      return;
    }
    const cell = this.cellAt(event);
    this.onHover(cell && this.elementAt(...cell));
  }

  release(event) {
    const moved = this.drag?.moved;
    this.drag = null;
    const cell = this.cellAt(event);
    if (!moved && cell) this.onPick(this.elementAt(...cell));
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(this.canvas.clientWidth * ratio);
    const height = Math.round(this.canvas.clientHeight * ratio);
    if (!this.shape || !width || !height) return;
    Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    if (!this.rows || !this.columns) return;
    context.imageSmoothingEnabled = false;
    this.drawCells(context, width, height);
    const place = (row, column) => [
      ((column - this.view.x) / this.view.width) * width,
      ((row - this.view.y) / this.view.height) * height,
    ];
    if (this.outline) this.outline(context, place, this);
    if (this.mark !== null) this.drawMark(context, place, ratio);
  }

  /** Draw the visible cells, or of many cells a sample. */
  drawCells(context, width, height) {
    const [left, top] = [Math.floor(this.view.x), Math.floor(this.view.y)];
    const right = Math.min(this.columns, Math.ceil(this.view.x + this.view.width));
    const bottom = Math.min(this.rows, Math.ceil(this.view.y + this.view.height));
    const across = Math.min(right - left, MOST_ACROSS);
    const down = Math.min(bottom - top, MOST_DOWN);
    const [cellWidth, cellHeight] = [width / this.view.width, height / this.view.height];
    const key = [left, top, right, bottom, ...this.axes, ...this.fixed.filter((_, dim) => !this.axes.includes(dim))].join();
    if (this.cells?.key !== key) this.cells = { key, picture: this.sample(left, top, right, bottom, across, down) };
    context.drawImage(
      this.cells.picture,
      (left - this.view.x) * cellWidth,
      (top - this.view.y) * cellHeight,
      (right - left) * cellWidth,
      (bottom - top) * cellHeight,
    );
  }

  /** Return a picture of the cells between these borders, with so many of them across and down. */
  sample(left, top, right, bottom, across, down) {
    const image = new ImageData(across, down);
    const base = this.elementAt(0, 0);
    const [rowStride, columnStride] = this.axes.map((axis) => this.strides[axis]);
    for (let y = 0; y < down; y++) {
      const row = top + Math.floor(((y + 0.5) * (bottom - top)) / down);
      for (let x = 0; x < across; x++) {
        const column = left + Math.floor(((x + 0.5) * (right - left)) / across);
        const color = this.colorAt(base + row * rowStride + column * columnStride);
        const at = 4 * (y * across + x);
        image.data[at] = color[0];
        image.data[at + 1] = color[1];
        image.data[at + 2] = color[2];
        image.data[at + 3] = 255;
      }
    }
    const picture = new OffscreenCanvas(across, down);
    picture.getContext("2d").putImageData(image, 0, 0);
    return picture;
  }

  drawMark(context, place, ratio) {
    const index = indexOf(this.mark, this.full);
    if (index.some((at, dim) => !this.axes.includes(dim) && at !== this.fixed[dim])) return;
    const [x, y] = place(index[this.axes[0]], index[this.axes[1]]);
    const [right, bottom] = place(index[this.axes[0]] + 1, index[this.axes[1]] + 1);
    const radius = 7 * ratio;
    // A mark at the border stays in the picture.
    const inside = (at, size) => (at < 0 || at > size ? at : Math.max(radius + ratio, Math.min(size - radius - ratio, at)));
    const [middle, center] = [inside((x + right) / 2, this.canvas.width), inside((y + bottom) / 2, this.canvas.height)];
    const isLarge = Math.min(right - x, bottom - y) > 3 * radius;
    for (const [ink, line] of [["#fff", 4], ["#000", 2]]) {
      context.strokeStyle = ink;
      context.lineWidth = line * ratio;
      context.beginPath();
      if (isLarge) context.rect(x + 3 * ratio, y + 3 * ratio, right - x - 6 * ratio, bottom - y - 6 * ratio);
      else context.arc(middle, center, radius, 0, 2 * Math.PI);
      context.stroke();
    }
  }
}
