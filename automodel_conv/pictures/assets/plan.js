// The page of a plan: two lists, the links between them, and pictures of the chosen tensors.
"use strict";

// Colors of rules and of sources; all are readable under black and on both backgrounds.
const HUES = [155, 28, 265, 200, 340, 95, 45, 225, 310, 180, 15, 130];
const NAME_ONLY = "(name only)";

const $ = (id) => document.getElementById(id);
const colorOfRule = (rule) => (rule < 0 ? "hsl(215 12% 62%)" : `hsl(${HUES[rule % HUES.length]} 55% 58%)`);

/** Return [red, green, blue] of a hue; lighter the further an element is in its source. */
function shade(hue, far) {
  const lightness = 0.42 + 0.36 * far;
  const chroma = 0.55 * (1 - Math.abs(2 * lightness - 1));
  const channel = (shift) => {
    const place = (shift + hue / 30) % 12;
    return Math.round(255 * (lightness - (chroma / 2) * Math.max(-1, Math.min(place - 3, 9 - place, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

class Page {
  constructor(plan) {
    this.plan = plan;
    this.target = null; // the chosen target, or null
    this.source = null; // row of the source in the left picture
    this.kept = null; // the element of the target that was clicked
    this.rule = null; // the rule that the lists are limited to
    this.lower = null;
    this.sources = new Rows($("sources"), (item, element) => this.fillSource(item, element), () => this.sourcesMoved());
    this.targets = new Rows($("targets"), (item, element) => this.fillTarget(item, element), () => this.drawLinks());
    this.picture = new Matrix($("target-matrix"), {
      onHover: (element) => this.explain(element ?? this.kept, false),
      onPick: (element) => this.explain(element, true),
    });
    this.origin = new Matrix($("source-matrix"), {
      onHover: (element) => (element === null ? this.explain(this.kept, false) : this.explainSource(element, false)),
      onPick: (element) => this.explainSource(element, true),
    });
    this.order = plan.names.map((_, row) => row);
    if (plan.places) {
      const { file, offset } = plan.places;
      this.order.sort((a, b) => file[a] - file[b] || offset[a] - offset[b]);
    }
    this.ruleOf = plan.names.map((_, row) => {
      const [first] = plan.targetsOf(row);
      return first === undefined ? null : plan.targets[first].rule;
    });
    this.showHeader();
    this.filter();
    this.listen();
  }

  showHeader() {
    const { plan } = this;
    if (!plan.places) $("files").textContent = "Sources";
    $("title").textContent = shown(plan.title);
    const written = plan.targets.reduce((sum, target) => sum + target.bytes, 0);
    const files = plan.places ? ` in ${counted(plan.places.files.length, "file")}` : "";
    const ranks = plan.ranks ? `, on ${counted(plan.ranks.labels.length, "rank")}` : "";
    const leftOut = plan.leftOut.length ? `; ${counted(plan.leftOut.length, "tensor")} left out` : "";
    const missing = plan.missing.length ? `; ${counted(plan.missing.length, "buffer")} without a source` : "";
    $("facts").textContent =
      `${counted(plan.names.length, "tensor")}${files} → ${counted(plan.targets.length, "buffer")}, ` +
      `${sizeText(written)}${ranks}${leftOut}${missing}`;
    const totals = new Map();
    for (const target of plan.targets) totals.set(target.rule, (totals.get(target.rule) ?? 0) + target.bytes);
    for (const [rule, bytes] of [...totals].sort((a, b) => b[1] - a[1])) {
      const chip = document.createElement("button");
      chip.className = "chip";
      chip.type = "button";
      chip.ariaPressed = "false";
      const text = rule < 0 ? NAME_ONLY : plan.rules[rule];
      chip.title = text;
      chip.append(ruleDot(rule), spanOf("", shown(text)), spanOf("size", sizeText(bytes)));
      chip.addEventListener("click", () => {
        this.rule = this.rule === rule ? null : rule;
        for (const other of $("rules").children) other.ariaPressed = String(other === chip && this.rule !== null);
        this.filter();
      });
      $("rules").append(chip);
    }
  }

  listen() {
    $("search").addEventListener("input", () => this.filter());
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && this.targets.items.length) this.choose(this.targets.items[0].row);
    });
    $("close").addEventListener("click", () => this.close());
    $("theme").addEventListener("click", () => {
      const isDark = getComputedStyle(document.documentElement).colorScheme === "dark" ||
        (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
      document.documentElement.dataset.theme = isDark ? "light" : "dark";
      this.drawAll();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.drawAll());
    addEventListener("keydown", (event) => event.key === "Escape" && this.close());
    new ResizeObserver(() => this.drawAll()).observe($("links"));
    for (const [id, list] of [["sources-map", this.sources], ["targets-map", this.targets]]) {
      const jump = (event) => {
        if (event.buttons !== 1) return;
        const box = $(id).getBoundingClientRect();
        list.reveal(Math.floor(((event.clientY - box.top) / box.height) * list.items.length));
      };
      $(id).addEventListener("pointerdown", jump);
      $(id).addEventListener("pointermove", jump);
    }
  }

  /** Limit both lists to the search and the rule. A tensor stays if it matches, or if what it fills does. */
  filter() {
    const { plan } = this;
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    this.lower ??= {
      names: plan.names.map((name) => name.toLowerCase()),
      targets: plan.targets.map((target) => target.name.toLowerCase()),
    };
    const matches = (name) => words.every((word) => name.includes(word));
    const allows = (target) => this.rule === null || target.rule === this.rule;
    const [sources, targets] = [new Uint8Array(plan.names.length), new Uint8Array(plan.targets.length)];
    for (const target of plan.targets) {
      if (!allows(target) || !matches(this.lower.targets[target.row])) continue;
      targets[target.row] = 1;
      for (const row of target.sources) for (const part of plan.withParts(row)) sources[part] = 1;
    }
    for (const row of this.order) {
      if (!matches(this.lower.names[row])) continue;
      const filled = plan.targetsOf(row).filter((number) => allows(plan.targets[number]));
      if (filled.length || this.rule === null) sources[row] = 1;
      for (const number of filled) targets[number] = 1;
    }
    const items = [];
    let file = null;
    this.placeOf = new Int32Array(plan.names.length).fill(-1);
    for (const row of this.order) {
      if (!sources[row]) continue;
      if (plan.fileOf(row) !== file) items.push({ file: (file = plan.fileOf(row)) });
      this.placeOf[row] = items.push({ row }) - 1;
    }
    this.sources.show(items);
    this.targets.show(plan.targets.filter((target) => targets[target.row]));
    this.targetPlace = new Int32Array(plan.targets.length).fill(-1);
    this.targets.items.forEach((target, place) => (this.targetPlace[target.row] = place));
    const [left, right] = [sumOf(sources), this.targets.items.length];
    const found = left + right ? `${counted(left, "tensor")}, ${counted(right, "buffer")}` : "nothing found";
    $("found").textContent = words.length ? found : "";
    $("left-count").textContent = counted(left, "tensor");
    $("right-count").textContent = counted(right, "tensor");
    this.drawMaps();
    this.drawLinks();
  }

  fillSource(item, element) {
    const { plan } = this;
    if (item.file !== undefined) {
      element.classList.add("file");
      element.textContent = shown(item.file);
      return;
    }
    const { row } = item;
    const rule = this.ruleOf[row];
    const shape = plan.shapesOf(row);
    element.append(
      rule === null ? spanOf("unused", "left out") : ruleDot(rule),
      nameOf(plan.names[row]),
      spanOf("kind", `${plan.kinds[row]} [${shape.join(", ")}]`),
      spanOf("size", sizeText(plan.bytesOf[row])),
    );
    element.title = plan.names[row];
    element.classList.toggle("chosen", row === this.source);
    element.ariaSelected = String(row === this.source);
    element.classList.toggle("linked", this.target !== null && this.used?.has(row));
    element.addEventListener("click", () => {
      const [first] = plan.targetsOf(row);
      if (first !== undefined) this.choose(first, row);
    });
  }

  fillTarget(target, element) {
    const { plan } = this;
    const parts = [
      ruleDot(target.rule),
      nameOf(target.name),
      spanOf("kind", `${target.dtype} [${target.shape.join(", ")}]`),
      spanOf("size", sizeText(target.bytes)),
    ];
    if (plan.ranks) parts.push(this.shareOf(target));
    element.append(...parts);
    element.title = `${target.name}\n${target.rule < 0 ? NAME_ONLY : plan.rules[target.rule]}\n${target.way}`;
    element.classList.toggle("chosen", target === this.target);
    element.ariaSelected = String(target === this.target);
    element.addEventListener("click", () => this.choose(target.row));
  }

  /** Return a bar of the parts of a target, in the colors of the first ranks that hold them. */
  shareOf(target) {
    const { plan } = this;
    const bar = spanOf("share", "");
    const parts = new Map();
    plan.ranks.labels.forEach((_, rank) => {
      const runs = plan.regionOf(target, rank);
      if (!parts.has(runs)) parts.set(runs, rank);
    });
    for (const [runs, rank] of parts) {
      const piece = document.createElement("span");
      piece.style.flex = `${runs.reduce((size, of) => size * sumOf(of.map((run) => run[1])), 1)}`;
      piece.style.background = parts.size > 1 ? this.rankColor(rank) : "var(--muted)";
      bar.append(piece);
    }
    bar.title = parts.size > 1 ? `${parts.size} parts` : "each rank holds the same";
    return bar;
  }

  close() {
    if ($("detail").contains(document.activeElement)) $("targets").focus();
    this.choose(null);
  }

  sourcesMoved() {
    const item = this.sources.items[this.sources.visible()[0]];
    $("first-file").textContent = item ? shown(item.file ?? this.plan.fileOf(item.row) ?? "") : "";
    this.drawLinks();
  }

  /** Show a target, and if given one of its sources; null closes the pictures. */
  choose(number, source = null) {
    const { plan } = this;
    this.target = number === null ? null : plan.targets[number];
    this.kept = null;
    $("detail").hidden = this.target === null;
    this.used = new Set(this.target?.sources ?? []);
    this.source = source ?? this.target?.sources[0] ?? null;
    if (this.target !== null) {
      const { target } = this;
      const way = target.way === "read" ? "read straight into place" : target.way;
      const kind = `${target.dtype} [${target.shape.join(", ")}]  ${way}`;
      $("target-name").replaceChildren(nameOf(target.name), spanOf("kind", kind));
      this.hueOf = new Map();
      const from = target.reason === null ? plan.copiesOf(target) : null;
      this.picture.show(target.shape, (element) => this.colorAt(from, element), target.name, this.outlines());
      // Scales fill nothing by themselves, so their codes are shown.
      const ordinal = target.sources.findIndex((row) => source === null || plan.withParts(row).includes(source));
      const first = from === null || ordinal < 0 ? null : this.firstOf(from, ordinal);
      this.explain(first ?? 0, true);
      this.targets.active = this.targetPlace[target.row];
      if (this.targets.active >= 0) this.targets.reveal(this.targets.active);
    }
    this.sources.redraw();
    this.targets.redraw();
    this.drawLinks();
  }

  /** Return the first element of the target that a source fills. */
  firstOf(from, ordinal) {
    let first = null;
    for (const copy of from.copies) {
      copy.ordinals.forEach((other, column) => {
        if (other === ordinal && (first === null || copy.targetOffsets[column] < first)) first = copy.targetOffsets[column];
      });
    }
    return first;
  }

  colorAt(from, element) {
    const found = from && from.sourceOf(element);
    if (!found) return [150, 150, 150];
    const row = this.target.sources[found.ordinal];
    return shade(this.hue(found.ordinal), this.farIn(row, found.element));
  }

  /** Return how far down in its source an element is, from 0 to 1. */
  farIn(row, element) {
    const shape = this.plan.shapesOf(row);
    const columns = shape.at(-1) ?? 1;
    const rows = shape.at(-2) ?? columns;
    const down = shape.length > 1 ? Math.floor(element / columns) % rows : element % columns;
    return rows > 1 ? down / (rows - 1) : 0;
  }

  /** Return the hue of a source of the target; those that come first in the target have the most different ones. */
  hue(ordinal) {
    if (!this.hueOf.has(ordinal)) this.hueOf.set(ordinal, HUES[this.hueOf.size % HUES.length]);
    return this.hueOf.get(ordinal);
  }

  /** Say where an element of the target comes from, and show its source; `keep` marks it. */
  explain(element, keep) {
    if (element === null || this.target === null) return;
    if (keep) this.kept = element;
    const { text, source, element: from } = this.plan.explain(this.target, element);
    const holders = this.plan.holdersOf(this.target, element);
    const held = holders.map(([rank, local]) => `${shown(this.plan.ranks.labels[rank])} at [${local.join(", ")}]`);
    const more = held.length > 4 ? ` and ${held.length - 4} more` : "";
    $("sentence").textContent = text;
    $("held").textContent = held.length ? `held by ${held.slice(0, 4).join("; ")}${more}` : "";
    this.picture.markElement(element);
    this.showSource(source, from, keep);
    this.showRanks(element, new Set(holders.map(([rank]) => rank)));
  }

  showSource(row, element, reveal) {
    const { plan } = this;
    $("source-name").textContent = "";
    this.origin.canvas.hidden = row === null;
    $("arrow").style.visibility = row === null ? "hidden" : "";
    if (row === null) return;
    const changed = row !== this.source;
    this.source = row;
    const shape = plan.shapesOf(row);
    $("source-name").replaceChildren(nameOf(plan.names[row]), spanOf("kind", `${plan.kinds[row]} [${shape.join(", ")}]`));
    const ordinal = this.target.sources.indexOf(row);
    const hue = this.hue(ordinal);
    this.origin.show(shape, (at) => shade(hue, this.farIn(row, at)), plan.names[row]);
    this.origin.markElement(element);
    if (changed) this.sources.redraw();
    if (reveal && this.placeOf[row] >= 0) this.sources.reveal(this.placeOf[row]);
    this.drawLinks();
  }

  explainSource(element, keep) {
    const from = this.plan.copiesOf(this.target);
    const filled = from.targetOf(this.target.sources.indexOf(this.source), element);
    if (filled !== null) this.explain(filled, keep);
  }

  /** Return a function that draws the borders of the parts of ranks over the picture of the target. */
  outlines() {
    if (!this.plan.ranks) return null;
    return (context, place, picture) => {
      this.plan.ranks.labels.forEach((_, rank) => {
        const runs = this.plan.regionOf(this.target, rank);
        if (runs.length < 2) return;
        const hidden = picture.fixed.some((at, dim) => !picture.axes.includes(dim) && heldAt(at, runs[dim]) < 0);
        if (hidden) return;
        context.strokeStyle = this.rankColor(rank);
        context.lineWidth = 3;
        for (const [top, tall] of runs[picture.axes[0]]) {
          for (const [left, wide] of runs[picture.axes[1]]) {
            const [x, y] = place(top, left);
            const [right, bottom] = place(top + tall, left + wide);
            context.strokeRect(x + 2, y + 2, right - x - 4, bottom - y - 4);
          }
        }
      });
    };
  }

  /** Show the part of each rank, side by side. */
  showRanks(element, holders) {
    const { plan, target } = this;
    $("ranks").hidden = !plan.ranks;
    if (!plan.ranks) return;
    const index = indexOf(element, target.shape);
    if (this.cardsOf !== target) {
      this.cardsOf = target;
      $("cards").replaceChildren(...plan.ranks.labels.map((label, rank) => this.cardOf(label, rank)));
    }
    const [first] = holders;
    if (first !== undefined) this.revealCard($("cards"), $("cards").children[first]);
    plan.ranks.labels.forEach((_, rank) => {
      const card = $("cards").children[rank];
      card.classList.toggle("holds", holders.has(rank));
      const local = plan.regionOf(target, rank).map((runs, dim) => heldAt(index[dim], runs));
      card.lastChild.textContent = holders.has(rank) ? `here: [${local.join(", ")}]` : "does not hold it";
    });
  }

  /** Scroll the cards so that one is in the middle, unless it can be seen. */
  revealCard(cards, card) {
    const left = card.offsetLeft - cards.offsetLeft;
    if (left >= cards.scrollLeft && left + card.offsetWidth <= cards.scrollLeft + cards.clientWidth) return;
    cards.scrollLeft = left - (cards.clientWidth - card.offsetWidth) / 2;
  }

  cardOf(label, rank) {
    const { plan, target } = this;
    const runs = plan.regionOf(target, rank);
    const shape = runs.map((of) => sumOf(of.map((run) => run[1])));
    const card = document.createElement("div");
    card.className = "rank";
    const title = document.createElement("strong");
    title.append(colorDot(this.rankColor(rank)), ` ${label}`);
    title.title = label;
    const [width, height] = [176, 56];
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width, height, ariaHidden: "true" });
    const parts = [`[${shape.join(", ")}]`, `${sizeText(plan.ranks.held[rank])} in all`, ""].map((text) => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    });
    card.append(title, parts[0], parts[1], canvas, parts[2]);
    // The outline is the whole buffer: dimension 0 down, dimension 1 across.
    const context = canvas.getContext("2d");
    const [down, across] = [target.shape[0] ?? 1, target.shape[1] ?? 1];
    const dark = getComputedStyle(document.body).color;
    context.strokeStyle = dark;
    context.fillStyle = this.rankColor(rank);
    for (const [top, tall] of runs[0] ?? [[0, 1]]) {
      for (const [left, wide] of runs[1] ?? [[0, 1]]) {
        const place = [(left / across) * width, (top / down) * height];
        context.fillRect(...place, Math.max(1, (wide / across) * width), Math.max(1, (tall / down) * height));
      }
    }
    context.strokeRect(0.5, 0.5, width - 1, height - 1);
    return card;
  }

  /** Return the color of a rank; more ranks than there are colors pass through the hues in their order. */
  rankColor(rank) {
    const count = this.plan.ranks.labels.length;
    if (count > HUES.length) return `hsl(${Math.round((330 * rank) / count)} 60% 56%)`;
    return `hsl(${HUES[(rank * 5 + 3) % HUES.length]} 55% 56%)`;
  }

  drawAll() {
    this.drawMaps();
    this.drawLinks();
    this.picture.draw();
    this.origin.draw();
  }

  /** Draw the strips beside the lists: all rows in the colors of their rules, and which of them can be seen. */
  drawMaps() {
    const colorOf = (item) => (item.file !== undefined ? null : item.row === undefined ? null : this.ruleOf[item.row]);
    drawMap($("sources-map"), this.sources, colorOf);
    drawMap($("targets-map"), this.targets, (target) => target.rule);
  }

  /** Draw the links between rows that can be seen; links to other rows end at the border. */
  drawLinks() {
    if (!this.targetPlace) return;
    const canvas = $("links");
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    Object.assign(canvas, { width: width * ratio, height: height * ratio });
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const top = $("sources").getBoundingClientRect().top - canvas.getBoundingClientRect().top;
    const limit = (y) => Math.max(top, Math.min(top + $("sources").clientHeight, y));
    const link = (target, place, row, alpha) => {
      const from = this.placeOf[row];
      if (from < 0) return;
      const y = limit(top + this.sources.yOf(from) + ROW_PIXELS / 2);
      const to = limit(top + this.targets.yOf(place) + ROW_PIXELS / 2);
      context.globalAlpha = alpha;
      context.strokeStyle = colorOfRule(target.rule);
      context.beginPath();
      context.moveTo(0, y);
      context.bezierCurveTo(width / 2, y, width / 2, to, width, to);
      context.stroke();
    };
    const [first, last] = this.targets.visible();
    const [start, stop] = this.sources.visible();
    for (let place = first; place < last; place++) {
      const target = this.targets.items[place];
      for (const row of target.sources) {
        const from = this.placeOf[row];
        if (from >= start && from < stop) link(target, place, row, this.target === null || this.target === target ? 0.7 : 0.15);
      }
    }
    if (this.target !== null && this.targetPlace[this.target.row] >= 0) {
      const place = this.targetPlace[this.target.row];
      const step = Math.ceil(this.target.sources.length / 200);
      for (let number = 0; number < this.target.sources.length; number += step) {
        link(this.target, place, this.target.sources[number], 0.35);
      }
      context.lineWidth = 3;
      if (this.source !== null) link(this.target, place, this.source, 1);
    }
    this.drawMaps();
  }
}

function drawMap(canvas, list, ruleOf) {
  const height = canvas.clientHeight;
  if (!height) return;
  Object.assign(canvas, { width: 14, height });
  const context = canvas.getContext("2d");
  const count = list.items.length;
  if (!count) return;
  for (let y = 0; y < height; y++) {
    const rule = ruleOf(list.items[Math.floor((y / height) * count)]);
    if (rule === null) continue;
    context.fillStyle = colorOfRule(rule);
    context.fillRect(0, y, 14, 1);
  }
  const [first, last] = list.visible();
  context.strokeStyle = getComputedStyle(document.body).color;
  context.lineWidth = 2;
  context.strokeRect(1, (first / count) * height + 1, 12, Math.max(6, ((last - first) / count) * height - 2));
}

function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

function sumOf(numbers) {
  return numbers.reduce((sum, number) => sum + number, 0);
}

function spanOf(name, text) {
  const span = document.createElement("span");
  span.className = name;
  span.textContent = text;
  return span;
}

/** Return a name that is cut at its beginning if there is no room, since names differ at their ends. */
function nameOf(text) {
  const span = spanOf("name", "");
  const inner = document.createElement("bdi");
  inner.textContent = shown(text);
  span.append(inner);
  return span;
}

function colorDot(color) {
  const span = spanOf("dot", "");
  span.style.background = color;
  return span;
}

function ruleDot(rule) {
  return colorDot(colorOfRule(rule));
}

readPlan(DATA).then(
  (plan) => {
    globalThis.page = new Page(plan);
    document.body.dataset.ready = "yes";
  },
  (error) => {
    $("facts").textContent = `This browser cannot read the page; those from the middle of 2023 on can. ${error}`;
  },
);
