// f(x, t) in ONNX Runtime, off the page's thread. Its code and its WebAssembly come with their integrity checked.

let ort, session;

async function get(url, integrity) {
  const answer = await fetch(url, integrity ? { integrity } : {});
  if (!answer.ok) throw new Error(`${url} answers ${answer.status}`);
  return answer.arrayBuffer();
}

async function start({ base, files, backend, model }) {
  const [[code, codeHash], [wasm, wasmHash]] = Object.entries(files);
  const [source, binary, weights] = await Promise.all([get(base + code, codeHash), get(base + wasm, wasmHash), get(model)]);
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  ort = await import(url);
  URL.revokeObjectURL(url);
  ort.env.wasm.wasmBinary = binary;
  ort.env.wasm.numThreads = 1; // more need headers that a plain web server does not send
  session = await ort.InferenceSession.create(new Uint8Array(weights), { executionProviders: [backend] });
}

async function evaluate({ x, t, shape }) {
  const feeds = { x: new ort.Tensor("float32", x, [t.length, ...shape]), t: new ort.Tensor("float32", t, [t.length]) };
  const begin = performance.now();
  const { x0_hat } = await session.run(feeds);
  return { images: x0_hat.data.slice(), milliseconds: performance.now() - begin };
}

self.onmessage = async ({ data: { id, task, ...input } }) => {
  try {
    self.postMessage({ id, result: await { start, evaluate }[task](input) });
  } catch (error) {
    self.postMessage({ id, error: String(error.message ?? error) });
  }
};
