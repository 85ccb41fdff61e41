// The page: an image or the camera in, what the model finds drawn over it.

import { Model } from './model.js';

const $ = (id) => document.getElementById(id);
const canvas = $('canvas'), pen = canvas.getContext('2d', { willReadFrequently: true });
let model, last, live = null;

const say = (text, failed = false) => {
  $('status').textContent = text;
  $('status').classList.toggle('error', failed);
};

async function start() {
  try {
    model = await Model.open('model.json');
  } catch (error) {
    $('name').textContent = 'The model cannot be opened';
    say(error.message, true);
    return;
  }
  const { settings, file } = model;
  const what = settings.task !== 'detection' ? settings.task
    : settings.masks ? 'instance segmentation' : 'detection';
  document.title = settings.name;
  $('name').textContent = settings.name;
  $('about').textContent = `${what}, ${settings.classes.length} classes; `
    + `${file.dynamic.includes('hw') ? 'images of any size' : `${file.size.join(' x ')} pixels`}; `
    + 'nothing is uploaded.';
  $('least').hidden = settings.task !== 'detection';
  $('least').style.display = settings.task !== 'detection' ? 'none' : '';
  $('choose').disabled = false;
  $('camera').disabled = !navigator.mediaDevices;
  const given = new URLSearchParams(location.search).get('image');
  if (given) await show(await (await fetch(given)).blob());
}

async function show(blob) {
  stop();
  try {
    const bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none' });
    await run(bitmap, bitmap.width, bitmap.height);
  } catch (error) {
    say(`This image cannot be used: ${error.message}`, true);
  }
}

async function run(source, width, height) {
  [canvas.width, canvas.height] = [width, height];
  pen.drawImage(source, 0, 0);
  $('stage').classList.add('filled');
  const image = pen.getImageData(0, 0, width, height);
  if (!live) say('Looking ...');
  const result = await model.predict(image);
  last = { image, result };
  draw();
  const { ms } = result, total = ms.prepare + ms.run + ms.finish;
  say(`${total.toFixed(0)} ms: ${ms.prepare.toFixed(0)} to prepare the image, `
    + `${ms.run.toFixed(0)} in the model, ${ms.finish.toFixed(0)} to finish`);
  document.body.dataset.done = 'yes';
}

function draw() {
  if (!last) return;
  const { image, result } = last, { palette, classes } = model.settings;
  const threshold = Number($('threshold').value);
  const picture = new ImageData(new Uint8ClampedArray(image.data), image.width, image.height);
  const color = (label) => palette[label % palette.length];
  const rows = [];
  if (result.probabilities) {
    const order = result.probabilities.map((_, label) => label)
      .sort((a, b) => result.probabilities[b] - result.probabilities[a]);
    order.slice(0, 5).forEach((label) => {
      rows.push([label, `${classes[label]} ${(100 * result.probabilities[label]).toFixed(1)} %`]);
    });
    pen.putImageData(picture, 0, 0);
  } else if (result.classes) {
    const counts = new Map();
    result.classes.forEach((label, p) => {
      counts.set(label, (counts.get(label) || 0) + 1);
      blend(picture.data, p, color(label));
    });
    [...counts].sort((a, b) => b[1] - a[1]).forEach(([label, count]) => {
      rows.push([label, `${classes[label]} ${(100 * count / result.classes.length).toFixed(0)} %`]);
    });
    pen.putImageData(picture, 0, 0);
  } else {
    const shown = result.scores.map((_, i) => i).filter((i) => result.scores[i] >= threshold);
    for (const i of [...shown].reverse()) {
      result.masks?.[i].forEach((inside, p) => {
        if (inside) blend(picture.data, p, color(result.labels[i]));
      });
    }
    pen.putImageData(picture, 0, 0);
    const unit = Math.max(canvas.width, canvas.height) / 600;
    pen.font = `600 ${Math.max(10, 13 * unit)}px system-ui, sans-serif`;
    pen.textBaseline = 'bottom';
    for (const i of [...shown].reverse()) box(result, i, color(result.labels[i]), unit);
    for (const i of shown) {
      const text = `${classes[result.labels[i]]} ${result.scores[i].toFixed(2)}`;
      rows.push([result.labels[i], text]);
    }
  }
  $('found').replaceChildren(...rows.map(([label, text]) => {
    const item = document.createElement('li'), dot = document.createElement('i');
    dot.style.background = `rgb(${color(label).join(',')})`;
    item.append(dot, text);
    return item;
  }));
  if (!rows.length) $('found').replaceChildren(Object.assign(
    document.createElement('li'), { textContent: 'nothing above the threshold' }));
}

function blend(data, pixel, [r, g, b]) {
  const i = 4 * pixel;
  [data[i], data[i + 1], data[i + 2]] = [
    (data[i] + r) / 2, (data[i + 1] + g) / 2, (data[i + 2] + b) / 2];
}

function box(result, i, color, unit) {
  const [x0, y0, x1, y1] = result.boxes[i];
  const text = `${model.settings.classes[result.labels[i]]} ${result.scores[i].toFixed(2)}`;
  const height = Math.max(10, 13 * unit) * 1.3, width = pen.measureText(text).width + 6 * unit;
  const top = Math.max(y0, height), left = Math.min(x0, Math.max(0, canvas.width - width));
  pen.lineWidth = Math.max(1, 2 * unit);
  pen.strokeStyle = pen.fillStyle = `rgb(${color.join(',')})`;
  pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
  pen.fillRect(left, top - height, width, height);
  pen.fillStyle = color[0] + color[1] + color[2] > 380 ? '#000' : '#fff';
  pen.fillText(text, left + 3 * unit, top - height * 0.1);
}

async function camera() {
  if (live) {
    stop();
    return;
  }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
    const video = Object.assign(document.createElement('video'), { srcObject: stream, muted: true });
    video.playsInline = true;
    await video.play();
    live = stream;
    $('camera').textContent = 'Stop camera';
    while (live === stream) {
      await run(video, video.videoWidth, video.videoHeight);
      await new Promise(requestAnimationFrame);
    }
  } catch (error) {
    stop();
    say(`The camera cannot be used: ${error.message}`, true);
  }
}

function stop() {
  live?.getTracks().forEach((track) => track.stop());
  live = null;
  $('camera').textContent = 'Camera';
}

const threshold = $('threshold');
threshold.value = 0.3;
$('value').textContent = '0.30';
threshold.addEventListener('input', () => {
  $('value').textContent = Number(threshold.value).toFixed(2);
  draw();
});
$('choose').addEventListener('click', () => $('file').click());
$('file').addEventListener('change', ({ target }) => target.files[0] && show(target.files[0]));
$('camera').addEventListener('click', camera);
const stage = $('stage');
for (const name of ['dragover', 'dragleave', 'drop']) {
  stage.addEventListener(name, (event) => {
    event.preventDefault();
    stage.classList.toggle('over', name === 'dragover');
  });
}
stage.addEventListener('drop', ({ dataTransfer }) => dataTransfer.files[0] && show(dataTransfer.files[0]));

start();
