// Standard normal noise, that of cmlib.ops.indexed_normal to the last bit (but for one in the tail, now and then): NumPy's
// Philox 4x64-10 (Salmon et al. 2011) under its float32 ziggurat of 256 strips (Marsaglia & Tsang 2000; Doornik 2005).

const WORD = (1n << 64n) - 1n;

function philox(counter, key) {
  let [a, b, c, d] = counter;
  let [k, l] = key;
  for (let round = 0; round < 10; round++) {
    const first = 0xd2e7470ee14c6c93n * a, second = 0xca5a826395121157n * c;
    [a, b, c, d] = [(second >> 64n) ^ b ^ k, second & WORD, (first >> 64n) ^ d ^ l, first & WORD];
    k = (k + 0x9e3779b97f4a7c15n) & WORD;
    l = (l + 0xbb67ae8584caa73bn) & WORD;
  }
  return [a, b, c, d];
}

const R = 3.6541528853610088, STRIPS = 256, UNIT = 2 ** 23;
const R32 = Math.fround(R), INVERSE = Math.fround(1 / R);
const density = (x) => Math.exp(-x * x / 2);
const AREA = 0.00492867323399; // of each strip, the lowest with its tail
const accept = new Uint32Array(STRIPS), width = new Float32Array(STRIPS), height = new Float32Array(STRIPS);
for (let i = STRIPS - 1, x = R, above = R; i > 0; i--, above = x, x = Math.sqrt(-2 * Math.log(AREA / x + density(x)))) {
  if (i < STRIPS - 1) accept[i + 1] = x / above * UNIT;
  [width[i], height[i]] = [x / UNIT, density(x)];
}
[accept[0], width[0], height[0]] = [R * density(R) / AREA * UNIT, AREA / density(R) / UNIT, 1];

// `size` numbers for image `index` of stream `seed`; evaluation k of sampling takes `stream` k.
export function normal(seed, index, size, stream = 0) {
  const key = [BigInt(seed), BigInt(index)];
  let block = 0n, words = [];
  const bits = () => { // 32 of them, each 64-bit word's lower half first
    if (words.length === 0) {
      words = philox([++block, 0n, 0n, BigInt(stream)], key).flatMap((w) => [Number(w & 0xffffffffn), Number(w >> 32n)]);
    }
    return words.shift();
  };
  const uniform = () => (bits() >>> 8) / 2 ** 24;
  const logarithm = () => Math.fround(-Math.log1p(-uniform()));
  const draw = () => {
    for (;;) {
      const r = bits(), i = r & 255, magnitude = (r >>> 9) & (UNIT - 1), sign = r & 256 ? -1 : 1;
      const x = Math.fround(magnitude * width[i]);
      if (magnitude < accept[i]) return sign * x;
      if (i === 0) {
        for (;;) {
          const [tail, y] = [Math.fround(INVERSE * logarithm()), logarithm()];
          if (Math.fround(y + y) > Math.fround(tail * tail)) return (magnitude >>> 8) & 1 ? -(R32 + tail) : R32 + tail;
        }
      }
      if ((height[i - 1] - height[i]) * uniform() + height[i] < density(x)) return sign * x;
    }
  };
  return Float32Array.from({ length: size }, draw);
}
