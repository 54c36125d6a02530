// Where elements come from and go to: the arithmetic of strided copies, without any drawing.
//
// A copy is {shape, sourceStrides, targetStrides, ordinals, sourceOffsets, targetOffsets}. For each column k and every
// index i < shape: target[targetOffsets[k] + i . targetStrides] = source[ordinals[k]][sourceOffsets[k] + i . sourceStrides].
// Numbers of elements are below 2 ** 53, so ordinary numbers are exact.
"use strict";

/** Return the number of elements of a tensor. */
function numelOf(shape) {
  return shape.reduce((product, size) => product * size, 1);
}

/** Return row-major strides in elements. */
function stridesOf(shape) {
  const strides = new Array(shape.length);
  let step = 1;
  for (let dim = shape.length - 1; dim >= 0; dim--) {
    strides[dim] = step;
    step *= Math.max(shape[dim], 1);
  }
  return strides;
}

/** Return the index in each dimension of an element of a contiguous tensor. */
function indexOf(element, shape) {
  return stridesOf(shape).map((stride, dim) => Math.floor(element / stride) % Math.max(shape[dim], 1));
}

/** Return the dimensions of a walk as [stride, size, dim], large strides first. */
function walkOf(shape, strides) {
  return shape.map((size, dim) => [strides[dim], size, dim]).sort((a, b) => b[0] - a[0]);
}

/** Return the index at which a walk from 0 is at a distance, or null if it is never there. */
function stepsTo(distance, walk) {
  const steps = new Array(walk.length);
  const find = (rest, level) => {
    if (level === walk.length) return rest === 0;
    const [stride, size, dim] = walk[level];
    if (stride === 0 || size === 1) {
      steps[dim] = 0;
      return find(rest, level + 1);
    }
    const most = Math.min(size - 1, Math.floor(rest / stride));
    // The dimensions after this one cannot cover more than they reach, so few steps come into question.
    let reach = 0;
    for (let inner = level + 1; inner < walk.length; inner++) reach += walk[inner][0] * (walk[inner][1] - 1);
    for (let step = most; step >= 0 && rest - step * stride <= reach; step--) {
      steps[dim] = step;
      if (find(rest - step * stride, level + 1)) return true;
    }
    return false;
  };
  return distance >= 0 && find(distance, 0) ? steps : null;
}

/** Return the distance in elements of an index from the first element. */
function distanceOf(steps, strides) {
  return steps.reduce((sum, step, dim) => sum + step * strides[dim], 0);
}

/** The copies of one target, prepared for questions about single elements. */
class Copies {
  constructor(copies) {
    this.copies = copies.map((copy) => {
      const order = copy.targetOffsets.map((_, column) => column);
      order.sort((a, b) => copy.targetOffsets[a] - copy.targetOffsets[b]);
      return {
        ...copy,
        order,
        sorted: order.map((column) => copy.targetOffsets[column]),
        reach: copy.shape.reduce((sum, size, dim) => sum + (size - 1) * copy.targetStrides[dim], 0),
        step: copy.targetStrides.reduce(divisorOf, 0), // what divides all distances
        targetWalk: walkOf(copy.shape, copy.targetStrides),
        sourceWalk: walkOf(copy.shape, copy.sourceStrides),
        isEmpty: copy.shape.some((size) => size === 0),
      };
    });
    this.last = null; // the last answer is often right for the next element
  }

  /** Return {ordinal, element, copy, column}: the source of an element of the target; null if no copy writes it. */
  sourceOf(element) {
    if (this.last !== null) {
      const found = this.tryColumn(this.last.copy, this.last.column, element);
      if (found) return found;
    }
    for (const copy of this.copies) {
      if (copy.isEmpty) continue;
      for (let place = lastAtMost(copy.sorted, element); place >= 0; place--) {
        if (element - copy.sorted[place] > copy.reach) break;
        const found = this.tryColumn(copy, copy.order[place], element);
        if (found) return found;
      }
    }
    return null;
  }

  tryColumn(copy, column, element) {
    const distance = element - copy.targetOffsets[column];
    if (distance < 0 || distance > copy.reach || distance % copy.step) return null;
    const steps = stepsTo(distance, copy.targetWalk);
    if (steps === null) return null;
    this.last = { copy, column };
    return {
      ordinal: copy.ordinals[column],
      element: copy.sourceOffsets[column] + distanceOf(steps, copy.sourceStrides),
      copy,
      column,
    };
  }

  /** Return the element of the target that an element of a source fills first; null if it fills none. */
  targetOf(ordinal, element) {
    for (const copy of this.copies) {
      if (copy.isEmpty) continue;
      for (let column = 0; column < copy.ordinals.length; column++) {
        if (copy.ordinals[column] !== ordinal) continue;
        const steps = stepsTo(element - copy.sourceOffsets[column], copy.sourceWalk);
        if (steps !== null) return copy.targetOffsets[column] + distanceOf(steps, copy.targetStrides);
      }
    }
    return null;
  }
}

/** Return the place of the last entry of an ascending list that is at most a number; -1 if there is none. */
function lastAtMost(sorted, number) {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= number) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** Return the step in each dimension of a target that a copy moves by; it skips the indices between. */
function stepOf(copy, shape) {
  const outer = stridesOf(shape);
  return shape.map((size, dim) => {
    let step = 0;
    copy.targetStrides.forEach((stride, inner) => {
      if (copy.shape[inner] < 2 || stride >= outer[dim] * size) return;
      // A smaller stride reaches this dimension if it continues the rows below it.
      if (stride >= outer[dim]) step = divisorOf(step, stride / outer[dim]);
      else if (stride * (copy.shape[inner] - 1) >= outer[dim]) step = 1;
    });
    return Number.isInteger(step) ? Math.max(step, 1) : 1;
  });
}

/** Return the largest number that divides both. */
function divisorOf(a, b) {
  return b ? divisorOf(b, a % b) : a;
}

/** Return an index in words: where a region begins, plus the distance in steps, such as ["17", "768 + 5", "1 + 2 * 7"]. */
function indexText(index, start, step) {
  return index.map((at, dim) => {
    const distance = at - start[dim];
    if (distance <= 0 || distance % step[dim]) return `${at}`;
    const moved = step[dim] > 1 ? `${step[dim]} * ${distance / step[dim]}` : `${distance}`;
    return start[dim] > 0 ? `${start[dim]} + ${moved}` : moved;
  });
}

/** Return a name with an index; a tensor without dimensions needs none. */
function placeText(name, index) {
  return index.length ? `${shown(name)}[${index.join(", ")}]` : shown(name);
}

/** Return a name with its control characters written out; letters from right to left turn no text around it. */
function shown(name) {
  const escape = (character) => `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`;
  const text = name.replace(/[\p{Cc}\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu, escape);
  return /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/.test(text) ? `\u2068${text}\u2069` : text;
}

/** Return where a part holds an index of one dimension, given its runs [start, length]; -1 if it does not hold it. */
function heldAt(index, runs) {
  let before = 0;
  for (const [start, length] of runs) {
    if (index >= start && index < start + length) return before + index - start;
    before += length;
  }
  return -1;
}
