// The plan that a page shows, and sentences about its elements.
"use strict";

/** Return the plan from compressed JSON in base64. */
async function readPlan(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Plan(JSON.parse(await new Response(stream).text()));
}

/** A plan in columns: the sources by row, and the targets by row. */
class Plan {
  constructor(data) {
    Object.assign(this, data);
    this.shapesOf = (row) => this.shapes[this.shapeOf[row]];
    this.targets = data.targets.map(([name, dtype, shape, rule, sources, group, way, bytes, fills, reason], row) => ({
      row, name, dtype, shape: this.shapes[shape], rule, sources, group, way: this.ways[way], bytes, fills, reason,
    }));
    this.groups = new Array(data.copies.length);
    this.filledBy = null;
  }

  /** Return the copies of a target, prepared once for all targets that share them. */
  copiesOf(target) {
    return (this.groups[target.group] ??= new Copies(
      this.copies[target.group].map(([shape, sourceStrides, targetStrides, ordinals, sourceOffsets, targetOffsets]) => ({
        shape, sourceStrides, targetStrides, ordinals, sourceOffsets, targetOffsets,
      })),
    ));
  }

  /** Return the rows of a source and of what decodes it. */
  withParts(row) {
    return this.decodes[row] ? [row, ...this.decodes[row][2]] : [row];
  }

  /** Return the rows of the targets that read a source. */
  targetsOf(row) {
    if (this.filledBy === null) {
      this.filledBy = new Array(this.names.length);
      // The scales of codes fill what the codes fill.
      for (const target of this.targets) {
        for (const source of target.sources) {
          for (const part of this.withParts(source)) (this.filledBy[part] ??= []).push(target.row);
        }
      }
    }
    return this.filledBy[row] ?? [];
  }

  /** Return the name of the file of a source; null if the sources are in no files. */
  fileOf(row) {
    return this.places && this.places.files[this.places.file[row]];
  }

  /** Return the constant at an element of a target, or null. */
  constantAt(target, element) {
    for (const [value, shape, strides, offset] of target.fills) {
      if (stepsTo(element - offset, walkOf(shape, strides)) !== null) return value;
    }
    return null;
  }

  /** Return {text, source, element} about an element of a target; source is null if no source fills it. */
  explain(target, element) {
    const index = indexOf(element, target.shape);
    if (numelOf(target.shape) === 0) return { text: `${shown(target.name)} has no elements`, source: null, element: null };
    if (target.reason !== null) {
      const text = `${placeText(target.name, index)} is computed by transformers' own code, because ${target.reason}`;
      return { text, source: null, element: null };
    }
    const found = this.copiesOf(target).sourceOf(element);
    if (found === null) {
      const value = this.constantAt(target, element);
      const from = value === null ? "nothing" : `the constant ${value}`;
      return { text: `${from} → ${placeText(target.name, index)}`, source: null, element: null };
    }
    const row = target.sources[found.ordinal];
    const { copy, column } = found;
    const written = indexText(index, indexOf(copy.targetOffsets[column], target.shape), stepOf(copy, target.shape));
    const text =
      `${this.places ? `${shown(this.fileOf(row))}: ` : ""}${this.elementText(row, found.element)}${this.decodedText(row, found.element)} → ` +
      placeText(target.name, written);
    return { text, source: row, element: found.element };
  }

  /** Return the name and the index of an element of a source, such as "embed.weight[3, 5]". */
  elementText(row, element) {
    const view = this.viewed[row] === undefined ? "" : `.view(${this.viewed[row]})`;
    return placeText(`${this.names[row]}${view}`, indexOf(element, this.shapesOf(row)));
  }

  /** Return which scale decodes an element of codes, and what else does. */
  decodedText(row, element) {
    if (!this.decodes[row]) return "";
    const [[rows, columns], [tall, wide], [scales, ...others], isInOrder] = this.decodes[row];
    const texts = others.map((part) => shown(this.names[part]));
    if (isInOrder) {
      const [down, across] = [Math.floor(element / columns) % rows, element % columns];
      const before = Math.floor(element / (rows * columns)) * Math.ceil(rows / tall) + Math.floor(down / tall);
      texts.unshift(this.elementText(scales, before * Math.ceil(columns / wide) + Math.floor(across / wide)));
    } else {
      texts.unshift(shown(this.names[scales]));
    }
    return ` decoded with ${texts.join(" and ")}`;
  }

  /** Return where each rank holds an element, as [rank, index in its part]. */
  holdersOf(target, element) {
    if (!this.ranks) return [];
    const index = indexOf(element, target.shape);
    const holders = [];
    this.ranks.labels.forEach((_, rank) => {
      const runs = this.regionOf(target, rank);
      const local = index.map((at, dim) => heldAt(at, runs[dim]));
      if (local.every((at) => at >= 0)) holders.push([rank, local]);
    });
    return holders;
  }

  /** Return the runs [start, length] of each dimension of a target that a rank holds. */
  regionOf(target, rank) {
    return this.ranks.regions[this.ranks.combinations[this.ranks.of[target.row]][rank]];
  }
}

/** Return a number of bytes in the unit that fits. */
function sizeText(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  return `${unit ? bytes.toFixed(1) : bytes} ${units[unit]}`;
}
