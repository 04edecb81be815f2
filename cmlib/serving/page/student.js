// The student: f(x, t) from a worker, and sampling with it as cmlib.consistency.sample does.

import { normal } from "./noise.js";

const here = (path) => new URL(path, import.meta.url).href;

export class Student {
  // `model` and `settings` as settings.json has them; `backend` is "webgpu" or "wasm".
  static async load(model, settings, backend) {
    const student = new Student();
    Object.assign(student, { ...model, backend, size: model.shape.reduce((a, b) => a * b), last: 0, calls: new Map() });
    student.worker = new Worker(here("worker.js"), { type: "module" });
    student.worker.onerror = (event) => {
      student.calls.forEach(({ reject }) => reject(new Error(event.message)));
      student.calls.clear();
    };
    student.worker.onmessage = ({ data: { id, result, error } }) => {
      const { resolve, reject } = student.calls.get(id);
      student.calls.delete(id);
      return error === undefined ? resolve(result) : reject(new Error(error));
    };
    const base = new URL(settings.runtime, here("./")).href;
    const file = here(`${encodeURIComponent(model.name)}/${model.file}`);
    try {
      await student.ask("start", { base, files: settings.files[backend], backend, model: file });
      await student.f(new Float32Array(student.size), [model.levels[0]]); // the first is slow
    } catch (error) {
      student.worker.terminate();
      throw error;
    }
    return student;
  }

  ask(task, input) {
    const id = this.last++;
    return new Promise((resolve, reject) => {
      this.calls.set(id, { resolve, reject });
      this.worker.postMessage({ id, task, ...input });
    });
  }

  // Ends the worker when it has answered.
  stop() {
    if (this.calls.size === 0) this.worker.terminate();
    else setTimeout(() => this.stop(), 100);
  }

  // f(x, t) for one or more images, clipped to [-1, 1], and how long it took.
  async f(x, t) {
    const { images, milliseconds } = await this.ask("evaluate", { x, t: Float32Array.from(t), shape: this.shape });
    return { images: images.map((value) => Math.min(1, Math.max(-1, value))), milliseconds };
  }

  noise(seeds, stream = 0) {
    const all = new Float32Array(seeds.length * this.size);
    seeds.forEach((seed, i) => all.set(normal(0, seed, this.size, stream), i * this.size));
    return all;
  }

  // x0 + sigma·z, z the noise of `seed`
  noisy(image, sigma, seed) {
    const z = this.noise([seed]);
    return image.map((value, i) => value + sigma * z[i]);
  }

  // Images from noise, one a seed (CM Alg. 1).
  async sample(seeds, evaluations = 1) {
    let [images, milliseconds] = [new Float32Array(seeds.length * this.size), 0];
    for (const [k, sigma] of this.sampling.sigmas[evaluations].entries()) {
      const scale = k === 0 ? sigma : Math.sqrt(sigma ** 2 - this.sampling.sigma_min ** 2);
      const z = this.noise(seeds, k);
      const made = await this.f(images.map((value, i) => value + scale * z[i]), seeds.map(() => sigma));
      images = made.images;
      milliseconds += made.milliseconds;
    }
    return { images, milliseconds };
  }
}
