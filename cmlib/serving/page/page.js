// The page: what the visitor chooses, and the pictures that follow from it.

import { Student } from "./student.js";

const $ = (id) => document.getElementById(id);
const here = (path) => new URL(path, import.meta.url).href;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const GALLERY = 36;

let student, examples, walks, image; // the student; uint8 examples and walks; the image at work, floats in [-1, 1]
let chosen = -1, timer = 0, animation = 0, times = [], newest = 0;

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

async function bytes(path) {
  const answer = await fetch(here(path));
  if (!answer.ok) throw new Error(`${path} answers ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}

// ---- pictures

const toFloats = (pixels) => Float32Array.from(pixels, (v) => v / 127.5 - 1);

// An image [C,H,W], floats in [-1, 1], on a canvas of its size.
function show(canvas, values) {
  const [channels, height, width] = student.shape, area = height * width;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pixels = new ImageData(width, height);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = Math.round((values[i + (channels === 1 ? 0 : c * area)] + 1) * 127.5);
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function tile(label, values, act) {
  const button = document.createElement("button"), canvas = document.createElement("canvas");
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.append(canvas);
  button.addEventListener("click", act);
  show(canvas, values);
  return button;
}

const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
const median = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];
const level = () => Number($("level").value);
const seedOf = (input) => Math.min(Math.max(0, Math.trunc(Number(input.value)) || 0), Number(input.max));

// ---- the jump

// Calls `task` at once; calls during it become one more when it is done.
function latest(task) {
  let busy = false, again = false;
  return async () => {
    if (busy) return void (again = true);
    busy = true;
    try {
      do {
        again = false;
        await task();
      } while (again);
    } catch (error) {
      say(`The student failed: ${error.message}`, true);
    } finally {
      busy = false;
    }
  };
}

const jump = latest(async () => {
  const sigma = student.levels[level()], x = student.noisy(image, sigma, seedOf($("seed")));
  show($("clean"), image);
  show($("noisy"), x.map((value) => value / Math.sqrt(1 + sigma ** 2)));
  $("sigma-said").textContent = `σ = ${sigma.toPrecision(3)}`;
  $("level").setAttribute("aria-valuetext", `σ = ${sigma.toPrecision(3)}`);
  const made = await student.f(x, [sigma]);
  show($("jump"), made.images);
  times = [...times, made.milliseconds].slice(-9);
  $("jump-said").textContent = milliseconds(median(times));
  $("jump").dataset.shown = [chosen, seedOf($("seed")), level()].join();
});

// The precomputed walk from this level: frame j of level k is row k(k+1)/2 + j of the image's.
function walk() {
  cancelAnimationFrame(animation);
  clearTimeout(timer);
  const there = walks && chosen >= 0 && seedOf($("seed")) === 0, k = level(), steps = k + 1;
  $("no-walk").hidden = there;
  $("no-walk").textContent = walks ? "Computed ahead, for the examples and seed 0 only." : "This page has no teacher.";
  $("walk-said").textContent = there ? "" : "–";
  if (!there) return;
  const size = student.size, rows = (student.levels.length * (student.levels.length + 1)) / 2;
  const frame = (j) => {
    const row = chosen * rows + (k * (k + 1)) / 2 + j;
    show($("walk"), toFloats(walks.subarray(row * size, (row + 1) * size)));
    $("walk-said").textContent = j + 1 < steps ? `${j + 1} / ${steps}` : `${steps} step${steps > 1 ? "s" : ""}`;
    if (j + 1 < steps) timer = setTimeout(() => (animation = requestAnimationFrame(() => frame(j + 1))), 45);
  };
  frame(calm.matches ? k : 0);
}

function update() {
  jump();
  walk();
}

// Work on an image: example `index`, or another one for -1.
function choose(values, index = -1) {
  [image, chosen] = [values, index];
  [...$("examples").children].forEach((button, i) => button.setAttribute("aria-pressed", i === index));
  update();
}

// ---- an image of one's own

const easel = { x: 0, y: 0, value: 1, down: false };

function colour() {
  const hex = $("colour").value;
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 127.5 - 1);
}

// A straight stroke from the easel's place to (x, y), one pixel wide on small images and two on others.
function paint(x = easel.x, y = easel.y) {
  const [channels, height, width] = student.shape, values = image.slice(), area = height * width;
  const ink = channels === 1 ? [easel.value] : colour(), steps = Math.max(Math.abs(x - easel.x), Math.abs(y - easel.y), 1);
  const places = width > 16 ? [[0, 0], [1, 0], [0, 1], [1, 1]] : [[0, 0]];
  for (let i = 0; i <= steps; i++) {
    for (const [right, down] of places) {
      const column = Math.round(easel.x + ((x - easel.x) * i) / steps) + right, row = Math.round(easel.y + ((y - easel.y) * i) / steps) + down;
      if (column < width && row < height) ink.forEach((value, c) => (values[c * area + row * width + column] = value));
    }
  }
  Object.assign(easel, { x, y });
  choose(values);
}

// Grey pixels are lit if they are dark, else put out; a stroke goes on as it began.
function begin() {
  const [, , width] = student.shape;
  easel.value = image[easel.y * width + easel.x] < 0 ? 1 : -1;
  paint();
}

function at(event) {
  const [, height, width] = student.shape, box = $("clean").getBoundingClientRect();
  const inside = (value, n) => Math.min(n - 1, Math.max(0, Math.floor(value * n)));
  return [inside((event.clientX - box.left) / box.width, width), inside((event.clientY - box.top) / box.height, height)];
}

function brush(shown) {
  const [, height, width] = student.shape;
  $("brush").hidden = !shown;
  $("brush").style.inset = "auto";
  Object.assign($("brush").style, {
    left: `${(100 * easel.x) / width}%`, top: `${(100 * easel.y) / height}%`,
    width: `${100 / width}%`, height: `${100 / height}%`,
  });
}

async function open(file) {
  const [channels, height, width] = student.shape;
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    return say(`${file.name} is not an image that this browser can read.`, true);
  }
  const canvas = new OffscreenCanvas(width, height), side = Math.min(picture.width, picture.height);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, (picture.width - side) / 2, (picture.height - side) / 2, side, side, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height), area = height * width;
  const grey = (i) => 0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2];
  const pixel = (i, c) => (channels === 1 ? grey(i) : data[4 * i + c]);
  choose(Float32Array.from({ length: student.size }, (_, i) => pixel(i % area, Math.floor(i / area)) / 127.5 - 1));
  $("file").value = ""; // the same file may come again
  ready();
}

// ---- the gallery

const gallery = latest(async () => {
  const first = seedOf($("first")), seeds = Array.from({ length: GALLERY }, (_, i) => first + i);
  const evaluations = Number(document.querySelector("[name=evaluations]:checked").value);
  const made = await student.sample(seeds, evaluations);
  const tiles = seeds.map((seed, i) => {
    const values = made.images.slice(i * student.size, (i + 1) * student.size);
    return tile(`Seed ${seed}: work on it`, values, () => {
      choose(values);
      $("clean").focus({ preventScroll: true });
      $("jump-title").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" });
    });
  });
  $("gallery").replaceChildren(...tiles);
  const each = made.milliseconds / GALLERY;
  $("gallery-said").textContent = `${GALLERY} images in ${milliseconds(made.milliseconds)}: ${milliseconds(each)} each`;
  $("gallery").dataset.shown = [first, evaluations].join();
});

// ---- start

const ready = () => say(`Runs on ${student.backend === "webgpu" ? "WebGPU" : "WebAssembly"}, in this browser.`);

async function backend() {
  const wanted = new URLSearchParams(location.search).get("backend");
  if (wanted) return wanted === "webgpu" ? "webgpu" : "wasm";
  return (await navigator.gpu?.requestAdapter().catch(() => null)) ? "webgpu" : "wasm";
}

async function load(model, settings) {
  say(`Loading the student of ${model.name}…`);
  const mine = ++newest, place = `${encodeURIComponent(model.name)}/`, wanted = await backend();
  const loaded = Student.load(model, settings, wanted).catch((error) => {
    if (wanted === "wasm") throw error;
    return Student.load(model, settings, "wasm"); // there was an adapter, but it does not do
  });
  const all = [loaded, bytes(`${place}examples.bin`), model.teacher ? bytes(`${place}walks.bin`) : null];
  const [came, ...files] = await Promise.all(all);
  if (mine !== newest) return came.stop(); // another one was chosen meanwhile
  student?.stop();
  [student, examples, walks] = [came, ...files];
  times = [];
  Object.assign($("level"), { max: student.levels.length - 1, value: Math.round(0.4 * student.levels.length), disabled: false });
  $("colour-label").hidden = student.shape[0] === 1;
  const parts = Array.from({ length: student.examples }, (_, i) => toFloats(examples.subarray(i * student.size, (i + 1) * student.size)));
  $("examples").replaceChildren(...parts.map((values, i) => tile(`Example ${i + 1}`, values, () => choose(values, i))));
  choose(parts[0], 0);
  await gallery();
  globalThis.student = student; // for the console: await student.sample([0, 1], 2)
  ready();
}

function listen() {
  $("level").addEventListener("input", update);
  $("seed").addEventListener("input", update);
  $("first").addEventListener("input", gallery);
  $("evaluations").addEventListener("change", gallery);
  $("more").addEventListener("click", () => {
    $("first").value = Math.min(seedOf($("first")) + GALLERY, Number($("first").max));
    gallery();
  });
  $("clear").addEventListener("click", () => choose(new Float32Array(student.size).fill(-1)));
  $("invert").addEventListener("click", () => choose(image.map((value) => -value)));
  $("file").addEventListener("change", () => $("file").files[0] && open($("file").files[0]));

  const clean = $("clean");
  clean.addEventListener("pointerdown", (event) => {
    clean.setPointerCapture(event.pointerId);
    easel.down = true;
    [easel.x, easel.y] = at(event);
    begin();
  });
  clean.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    if (easel.down && (x !== easel.x || y !== easel.y)) paint(x, y);
  });
  clean.addEventListener("lostpointercapture", () => (easel.down = false));
  clean.addEventListener("focus", () => brush(clean.matches(":focus-visible")));
  clean.addEventListener("blur", () => brush(false));
  clean.addEventListener("keydown", (event) => {
    const [, height, width] = student.shape;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) Object.assign(easel, { x: (easel.x + step[0] + width) % width, y: (easel.y + step[1] + height) % height });
    else if (event.key === " ") begin();
    else return;
    event.preventDefault();
    brush(true);
  });

  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      $("easel").classList.toggle("dropping", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
    });
  }
}

try {
  const settings = await (await fetch(here("settings.json"))).json(), [first, ...others] = settings.models;
  await load(first, settings);
  listen();
  $("models").hidden = others.length === 0;
  for (const model of settings.models) {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "model", checked: model === first });
    input.addEventListener("change", () => load(model, settings).catch((error) => say(error.message, true)));
    label.append(input, model.name);
    $("models").append(label);
  }
} catch (error) {
  say(`The student cannot be loaded: ${error.message}`, true);
}
