// An exported model in the browser: the arithmetic of predict.py, which is that of mmdet and mmseg.
// `Model.open('model.json')`, then `await model.predict(imageData)`.

const RUNTIME = './runtime/ort.wasm.bundle.min.mjs';
const f32 = Math.fround;

export class Model {
  static async open(path) {
    const folder = new URL('.', new URL(path, location.href));
    const settings = await (await fetch(path)).json();
    let ort;
    try {
      ort = await import(new URL(RUNTIME, folder).href);
    } catch (error) {
      throw new Error('The folder "runtime" is missing or damaged; '
        + 'run: repnext-mm deploy runtime, with this folder.', { cause: error });
    }
    ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
    const file = settings.files[0];
    const session = await ort.InferenceSession.create(new URL(file.path, folder).href);
    return new Model(settings, file, ort, session);
  }

  constructor(settings, file, ort, session) {
    Object.assign(this, { settings, file, ort, session });
    this.size = file.dynamic.includes('hw') ? null : file.size;
  }

  // ImageData to { boxes, scores, labels, masks } or { classes }, in pixels of the image.
  async predict(image) {
    const start = performance.now();
    const original = [image.height, image.width];
    const { data, shape, inside, factors } = prepare(image, this.settings, this.size);
    const { Tensor } = this.ort;
    const batch = this.file.dynamic.includes('batch') ? 1 : this.file.batch;
    const pixels = new Float32Array(batch * data.length);
    for (let i = 0; i < batch; i++) pixels.set(data, i * data.length);
    const sizes = new Float32Array(2 * batch).map((_, i) => inside[i % 2]);
    const inputs = {
      image: new Tensor('float32', pixels, [batch, 3, ...shape]),
      image_size: new Tensor('float32', sizes, [batch, 2]),
      out_size: new Tensor('int64', BigInt64Array.from(original.map(BigInt)), [2]),
    };
    const fed = Object.fromEntries(this.file.inputs.map((name) => [name, inputs[name]]));
    const ready = performance.now();
    const outputs = await this.session.run(fed);
    const ran = performance.now();
    const result = finish(outputs, this.settings, original, factors);
    const done = performance.now();
    result.ms = { prepare: ready - start, run: ran - ready, finish: done - ran };
    return result;
  }
}

// --- an image, as the model requires it

// Two pixels for each new one and their weights in 1/2048; OpenCV rounds its edges per axis.
function weights(size, old, atEdge) {
  const low = new Int32Array(size), high = new Int32Array(size);
  const first = new Int32Array(size), second = new Int32Array(size);
  for (let i = 0; i < size; i++) {
    const at = f32((i + 0.5) * (old / size) - 0.5);
    let floor = Math.floor(at), part = f32(at - floor);
    if (atEdge && (floor < 0 || floor >= old - 1)) {
      part = 0;
      floor = Math.min(Math.max(floor, 0), old - 1);
    }
    low[i] = Math.min(Math.max(floor, 0), old - 1);
    high[i] = Math.min(Math.max(floor + 1, 0), old - 1);
    first[i] = roundEven(f32(f32(1 - part) * 2048));
    second[i] = roundEven(f32(part * 2048));
  }
  return { low, high, first, second };
}

function roundEven(value) {
  const floor = Math.floor(value), rest = value - floor;
  if (rest !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

// What cv2.resize makes of { data, width, height } with 3 bytes per pixel, bilinear, to the bit.
export function resize(image, width, height) {
  const x = weights(width, image.width, true), y = weights(height, image.height, false);
  const stride = image.width * 3, rows = new Map();
  const row = (number) => {
    if (!rows.has(number)) {
      const line = new Int32Array(width * 3);
      for (let i = 0, o = 0; i < width; i++) {
        const left = number * stride + x.low[i] * 3, right = number * stride + x.high[i] * 3;
        for (let c = 0; c < 3; c++, o++) {
          line[o] = image.data[left + c] * x.first[i] + image.data[right + c] * x.second[i];
        }
      }
      if (rows.size > 4) rows.clear();
      rows.set(number, line);
    }
    return rows.get(number);
  };
  const data = new Uint8Array(width * height * 3);
  for (let j = 0, o = 0; j < height; j++) {
    const above = row(y.low[j]), below = row(y.high[j]), a = y.first[j], b = y.second[j];
    for (let i = 0; i < width * 3; i++, o++) {
      const sum = (((above[i] >> 4) * a) >> 16) + (((below[i] >> 4) * b) >> 16);
      data[o] = Math.min(Math.max((sum + 2) >> 2, 0), 255);
    }
  }
  return { data, width, height };
}

function resized(image, how, size) {
  const { width, height } = image;
  let to;
  if (how.multiple) {
    to = [width, height].map((side) => Math.ceil(side / how.multiple) * how.multiple);
  } else if (size) {
    to = [size[1], size[0]];
    if (how.keep_ratio) {
      const factor = Math.min(size[0] / height, size[1] / width);
      to = [width, height].map((side) => Math.floor(side * factor + 0.5));
    }
  } else {
    const scaled = [width, height].map((side) => Math.floor(side * how.factor + 0.5));
    const scale = how.factor ? scaled : how.scale;
    to = how.keep_ratio ? fitting(width, height, scale) : scale;
  }
  return to[0] === width && to[1] === height ? image : resize(image, ...to);
}

function fitting(width, height, scale) {
  const factor = Math.min(Math.max(...scale) / Math.max(height, width),
    Math.min(...scale) / Math.min(height, width));
  return [width, height].map((side) => Math.floor(side * factor + 0.5));
}

function padded(image, how) {
  let { width, height } = image;
  if (how.square) width = height = Math.max(width, height);
  else if (how.size) [width, height] = [Math.max(width, how.size[0]), Math.max(height, how.size[1])];
  else [width, height] = [width, height].map((s) => Math.ceil(s / how.divisor) * how.divisor);
  const fill = Array.isArray(how.value) ? how.value : [how.value, how.value, how.value];
  const data = new Uint8Array(width * height * 3);
  for (let i = 0; i < data.length; i++) data[i] = fill[i % 3];
  for (let j = 0; j < image.height; j++) {
    const line = image.data.subarray(j * image.width * 3, (j + 1) * image.width * 3);
    data.set(line, j * width * 3);
  }
  return { data, width, height };
}

// What Pillow's resize makes of an image: taps in whole numbers, columns first.
const FILTERS = {
  bilinear: [1, (x) => (x < 1 ? 1 - x : 0)],
  bicubic: [2, (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1
    : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0)],
};

function taps(size, old, name) {
  const [reach, weigh] = FILTERS[name];
  const scale = old / size, wide = Math.max(scale, 1), support = reach * wide;
  return Array.from({ length: size }, (_, i) => {
    const center = (i + 0.5) * scale;
    const low = Math.max(Math.trunc(center - support + 0.5), 0);
    const high = Math.min(Math.trunc(center + support + 0.5), old);
    const raw = Array.from({ length: high - low },
      (__, k) => weigh(Math.abs((k + low - center + 0.5) * (1 / wide))));
    const by = 1 / raw.reduce((sum, value) => sum + value, 0);
    const weights = raw.map((value) => Math.trunc(value * by * 2 ** 22 + (value < 0 ? -0.5 : 0.5)));
    return { low, weights };
  });
}

function resample(image, along, size, old, name) {
  const step = along === 'x' ? 3 : image.width * 3;
  const [width, height] = along === 'x' ? [size, image.height] : [image.width, size];
  const data = new Uint8Array(width * height * 3), every = taps(size, old, name);
  for (let j = 0, o = 0; j < height; j++) {
    for (let i = 0; i < width; i++) {
      const { low, weights } = every[along === 'x' ? i : j];
      const start = along === 'x' ? (j * image.width + low) * 3 : (low * image.width + i) * 3;
      for (let c = 0; c < 3; c++, o++) {
        let sum = 2 ** 21;
        for (let k = 0, p = start + c; k < weights.length; k++, p += step) {
          sum += weights[k] * image.data[p];
        }
        data[o] = Math.min(Math.max(Math.floor(sum / 2 ** 22), 0), 255);
      }
    }
  }
  return { data, width, height };
}

function shortened(image, { side, filter }) {
  if (!FILTERS[filter]) throw new Error(`This page does not know the filter ${filter}.`);
  const { width, height } = image;
  const long = Math.trunc((side * Math.max(width, height)) / Math.min(width, height));
  const [columns, rows] = width <= height ? [side, long] : [long, side];
  let result = image;
  if (columns !== width) result = resample(result, 'x', columns, width, filter);
  if (rows !== height) result = resample(result, 'y', rows, height, filter);
  return result;
}

function cropped(image, [height, width]) {
  const data = new Uint8Array(width * height * 3);
  // Halves are rounded to even numbers, as in Python.
  const even = (twice) => (twice % 4 === 1 || twice % 4 === -3 ? (twice - 1) / 2
    : twice % 2 ? (twice + 1) / 2 : twice / 2);
  const offset = (old, now) => (old < now ? -Math.floor((now - old) / 2) : even(old - now));
  const top = offset(image.height, height), left = offset(image.width, width);
  for (let j = 0; j < height; j++) {
    const row = j + top;
    if (row < 0 || row >= image.height) continue;
    for (let i = 0; i < width; i++) {
      const column = i + left;
      if (column < 0 || column >= image.width) continue;
      const from = (row * image.width + column) * 3;
      data.set(image.data.subarray(from, from + 3), (j * width + i) * 3);
    }
  }
  return { data, width, height };
}

export function prepare(rgba, settings, size) {
  let image = { data: new Uint8Array(rgba.width * rgba.height * 3), ...sides(rgba) };
  for (let i = 0, o = 0; i < rgba.data.length; i += 4, o += 3) {  // blue first, as mm loads it
    image.data[o] = rgba.data[i + 2];
    image.data[o + 1] = rgba.data[i + 1];
    image.data[o + 2] = rgba.data[i];
  }
  const factors = [1, 1];
  for (const step of settings.steps) {
    if (step.pad) {
      image = padded(image, step.pad);
      continue;
    }
    if (step.shorter || step.crop) {
      image = step.crop ? cropped(image, step.crop) : shortened(image, step.shorter);
      continue;
    }
    const how = { ...step.resize }, before = sides(image);
    if (settings.task === 'segmentation' && size) how.keep_ratio = false;
    image = resized(image, how, size);
    factors[0] *= image.width / before.width;
    factors[1] *= image.height / before.height;
  }
  const inside = [image.height, image.width], divisor = settings.divisor || 1;
  const shape = size || inside.map((side) => Math.ceil(side / divisor) * divisor);
  const exact = settings.task === 'classification';
  const other = shape[0] !== inside[0] || shape[1] !== inside[1];
  if (shape[0] < inside[0] || shape[1] < inside[1] || (exact && other)) {
    throw new Error(`An image of ${inside.join(' x ')} pixels does not fit into the file.`);
  }
  const data = new Float32Array(3 * shape[0] * shape[1]).fill(settings.pad_value || 0);
  const { normalize } = settings;
  for (let c = 0; c < 3; c++) {
    const from = normalize && normalize.swap ? 2 - c : c;
    for (let j = 0; j < inside[0]; j++) {
      let o = (c * shape[0] + j) * shape[1], i = j * image.width * 3 + from;
      for (let k = 0; k < inside[1]; k++, o++, i += 3) {
        data[o] = normalize
          ? f32(f32(image.data[i] - f32(normalize.mean[c])) / f32(normalize.std[c]))
          : image.data[i];
      }
    }
  }
  return { data, shape, inside, factors };
}

const sides = ({ width, height }) => ({ width, height });

// --- outputs, as mm finishes them

export function finish(outputs, settings, original, factors) {
  if (settings.task === 'classification') return { probabilities: softmax(outputs.logits) };
  if (settings.task === 'segmentation') return { classes: classMap(outputs, original) };
  const scores = outputs.scores.data, count = outputs.scores.dims[1];
  const found = [...Array(count).keys()].filter((i) => scores[i] > 0);
  const divide = [factors[0], factors[1], factors[0], factors[1]].map(f32);
  const result = {
    boxes: found.map((i) => divide.map((by, k) => f32(outputs.boxes.data[4 * i + k] / by))),
    scores: found.map((i) => scores[i]),
    labels: found.map((i) => Number(outputs.labels.data[i])),
  };
  if (outputs.masks) {
    const [, , rows, columns] = outputs.masks.dims, area = rows * columns;
    const mask = (i) => ({
      data: outputs.masks.data.subarray(i * area, (i + 1) * area), rows, columns });
    result.masks = found.map((i, n) => settings.masks === 'boxes'
      ? paste(mask(i), result.boxes[n], original, settings.mask_threshold)
      : imageMask(mask(i), settings, original, factors));
  }
  return result;
}

function softmax({ data, dims }) {
  const logits = data.slice(0, dims[1]);
  const most = logits.reduce((a, b) => Math.max(a, b));
  const powers = Array.from(logits, (value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((value) => value / sum);
}

function classMap(outputs, [height, width]) {
  if (outputs.classes) return Int32Array.from(outputs.classes.data);
  const { data, dims: [, channels] } = outputs.logits, area = height * width;
  const classes = new Int32Array(area);
  for (let p = 0; p < area; p++) {
    let best = 0;
    for (let c = 1; c < channels; c++) if (data[c * area + p] > data[best * area + p]) best = c;
    classes[p] = channels > 1 ? best : Number(data[p] > 0);
  }
  return classes;
}

// How torch's grid_sample weighs a mask's pixels between start and stop, zero outside.
function sampling(start, stop, low, high, size) {
  const taps = [];
  for (let i = start; i < stop; i++) {
    let at = f32(f32(f32(f32(i + 0.5) - low) / f32(high - low)) * 2 - 1);
    if (Math.abs(at) === Infinity) at = 0;
    at = f32(f32(f32(at + 1) * size) / 2 - 0.5);
    const floor = Math.floor(at), part = f32(at - floor);
    const each = [[floor, f32(1 - part)], [floor + 1, part]];
    taps.push(Number.isNaN(at) ? [] : each.filter(([place]) => place >= 0 && place < size));
  }
  return taps;
}

// A mask of a box { data, rows, columns } as a mask of the image, one byte per pixel.
function paste(mask, [x0, y0, x1, y1], [height, width], threshold) {
  const full = new Uint8Array(height * width);
  const left = Math.max(Math.floor(x0) - 1, 0), top = Math.max(Math.floor(y0) - 1, 0);
  const right = Math.min(Math.ceil(x1) + 1, width), bottom = Math.min(Math.ceil(y1) + 1, height);
  if (right <= left || bottom <= top) return full;
  const rows = sampling(top, bottom, y0, y1, mask.rows);
  const columns = sampling(left, right, x0, x1, mask.columns);
  rows.forEach((vertical, j) => columns.forEach((horizontal, i) => {
    let sum = 0;
    for (const [row, a] of vertical) {
      for (const [column, b] of horizontal) sum += a * b * mask.data[row * mask.columns + column];
    }
    full[(top + j) * width + left + i] = Number(f32(sum) >= threshold);
  }));
  return full;
}

// RTMDet-Ins: logits over the image at a stride, to a mask of the image.
function imageMask(mask, settings, [height, width], factors) {
  const stride = settings.mask_stride;
  const large = bilinear(mask, mask.rows * stride, mask.columns * stride);
  // As mmdet, which swaps the factors of width and height; they are nearly the same.
  const values = bilinear(large, Math.ceil(large.rows * (1 / factors[0])),
    Math.ceil(large.columns * (1 / factors[1])));
  const full = new Uint8Array(height * width);
  for (let j = 0; j < Math.min(height, values.rows); j++) {
    for (let i = 0; i < Math.min(width, values.columns); i++) {
      const value = 1 / (1 + Math.exp(-values.data[j * values.columns + i]));
      full[j * width + i] = Number(value > settings.mask_threshold);
    }
  }
  return full;
}

function bilinear(map, rows, columns) {
  if (rows === map.rows && columns === map.columns) return map;
  const taps = (size, old) => Array.from({ length: size }, (_, i) => {
    const at = Math.max(f32(f32(i + 0.5) * f32(old / size) - 0.5), 0);
    const low = Math.min(Math.trunc(at), old - 1);
    return [low, Math.min(low + 1, old - 1), f32(at - low)];
  });
  const x = taps(columns, map.columns), data = new Float32Array(rows * columns);
  taps(rows, map.rows).forEach(([above, below, v], j) => x.forEach(([left, right, h], i) => {
    const at = (row, column) => map.data[row * map.columns + column];
    const first = at(above, left) * (1 - v) + at(below, left) * v;
    const second = at(above, right) * (1 - v) + at(below, right) * v;
    data[j * columns + i] = first * (1 - h) + second * h;
  }));
  return { data, rows, columns };
}
