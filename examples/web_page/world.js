// The graphs of a pipeline, run by ONNX Runtime. A moment is a plain object that is never changed: going back and forking are
// keeping moments. Keys and values lie frame by frame, (2 * layers, heads, tokens, channels) each, and moments share them.

export const NOTHING = {number: 0, last: null, kept: [], long: [], short: []};
const MOST_DIFFERENCE = 0.05; // of latents of unit variance, from the pipeline's; int8 weights stay below

async function loadRuntime(provider) {
  const folder = new URL("onnxruntime/", import.meta.url).href;
  const ort = await import(`${folder}ort.${provider}.min.mjs`);
  ort.env.wasm.wasmPaths = folder;
  ort.env.logLevel = "error";
  return ort;
}

export class World {
  // WebGPU where there is one that computes what the pipeline does, else WASM.
  static async open(form, precision, provider, threads) {
    const adapter = provider === "wasm" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
    if (adapter) {
      try {
        return await World.load(form, precision, "webgpu", 1);
      } catch (error) {
        if (provider) throw error;
        console.warn(`WebGPU is left aside: ${error.message}`);
      }
    }
    threads ??= self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
    return World.load(form, precision, "wasm", threads);
  }

  static async load(form, precision, provider, threads) {
    const world = new World();
    Object.assign(world, {form, precision, provider, threads, scratch: {}, sessions: {}});
    world.ort = await loadRuntime(provider);
    world.ort.env.wasm.numThreads = threads;
    for (const name of form.graphs) {
      const url = new URL(`${precision}/${name}.onnx`, import.meta.url).href;
      world.sessions[name] = await world.ort.InferenceSession.create(url, {executionProviders: [provider]});
    }
    await world.check();
    return world;
  }

  // The frame that comes of a noise of nothing but halves is known.
  async check() {
    const half = new Float32Array(this.form.check.length).fill(0.5);
    const {last} = await this.step(NOTHING, null, half);
    this.difference = Math.max(...this.form.check.map((value, index) => Math.abs(value - last.latents[index])));
    if (!(this.difference < MOST_DIFFERENCE)) {
      throw new Error(`${this.provider} with ${this.precision} draws other frames: latents differ by ${this.difference}`);
    }
  }

  // The moment after the next frame, made of this noise under this action; null: none, as for a first frame.
  async step(past, action, noise) {
    const moment = await this.written(past);
    const fed = action ?? this.form.null_action;
    const [latents] = await this.run("denoise", [this.latents(noise), this.actions(fed)], moment);
    const [picture] = await this.run("decode", [this.latents(latents)]);
    return this.after(moment, {latents, fed, picture});
  }

  // The moment after a frame that was seen, (3, height, width) in [0, 1].
  async see(past, action, picture) {
    const moment = await this.written(past);
    const {height, width} = this.form;
    const [latents] = await this.run("encode", [new this.ort.Tensor("float32", picture, [1, 3, height, width])]);
    return this.after(moment, {latents, fed: action ?? this.form.null_action, picture});
  }

  after(moment, frame) {
    return {...moment, number: moment.number + 1, last: frame, kept: [...moment.kept, frame]};
  }

  // The latest frame becomes context. Where the window is full, the oldest short frame turns long and leaves its place.
  async written(past) {
    if (past.last === null) return past;
    const {latents, fed} = past.last;
    if (this.form.window === null || past.short.length + 2 <= this.form.window) {
      const [short] = await this.run("write", [this.latents(latents), this.actions(fed)], past);
      return {...past, short: [...past.short, short]};
    }
    const [oldest, ...kept] = past.kept;
    const moment = {...past, kept, short: past.short.slice(1)};
    const both = Float32Array.of(...oldest.latents, ...latents);
    const [long, short] = await this.run("roll", [this.latents(both), this.actions(oldest.fed, fed)], moment);
    return {...moment, long: [...past.long, long], short: [...moment.short, short]};
  }

  async run(name, inputs, moment) {
    const session = this.sessions[name];
    if (moment) inputs = [...inputs, ...this.packed("long", moment.long), ...this.packed("short", moment.short)];
    const outputs = await session.run(Object.fromEntries(session.inputNames.map((name, index) => [name, inputs[index]])));
    return session.outputNames.map((name) => outputs[name].data);
  }

  // Keys and values of each layer, those of all frames together: (1, heads, tokens, channels).
  packed(kind, blocks) {
    const {parts, heads, channels, tokens} = this.form;
    if (tokens[kind] === 0) return [];
    const size = tokens[kind] * channels;
    return Array.from({length: parts}, (_, part) => {
      const key = `${kind}${part}`, length = heads * blocks.length * size;
      if (this.scratch[key]?.length !== length) this.scratch[key] = new Float32Array(length);
      for (let head = 0; head < heads; head++) {
        const start = (part * heads + head) * size;
        blocks.forEach((block, frame) => {
          this.scratch[key].set(block.subarray(start, start + size), (head * blocks.length + frame) * size);
        });
      }
      return new this.ort.Tensor("float32", this.scratch[key], [1, heads, blocks.length * tokens[kind], channels]);
    });
  }

  latents(values) {
    const [channels, height, width] = this.form.latent_shape;
    const frames = values.length / (channels * height * width);
    return new this.ort.Tensor("float32", values, [1, frames, channels, height, width]);
  }

  actions(...fed) {
    return new this.ort.Tensor("int64", BigInt64Array.from(fed, BigInt), [1, fed.length]);
  }

  // Normal numbers that depend on the seed and on which frame they are for alone: the same actions make the same frames again.
  noise(seed, number) {
    let state = Math.imul(seed, 0x9e3779b1) ^ Math.imul(number + 1, 0x85ebca6b);
    const uniform = () => { // mulberry32, in (0, 1]
      state = (state + 0x6d2b79f5) | 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
      return (((mixed ^ (mixed >>> 14)) >>> 0) + 1) / 4294967296;
    };
    const length = this.form.latent_shape.reduce((product, side) => product * side, 1);
    return Float32Array.from({length}, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
  }
}
