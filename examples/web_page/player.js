import {NOTHING, World} from "./world.js";

const MOST_MOMENTS = 256; // that one can go back
const SAME_KEYS = {w: "ArrowUp", a: "ArrowLeft", s: "ArrowDown", d: "ArrowRight", " ": "Space"};
const SIGNS = {ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→"};

const element = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const form = await (await fetch("form.json")).json();
const canvas = element("picture"), context = canvas.getContext("2d");
let world, walks = [[NOTHING]], current = 0, seed = Number(query.get("seed") ?? 0);
let busy = false, held = null, waiting = null, rate = null;

const here = () => walks[current].at(-1);

function draw() {
  const {last, number, long, short} = here();
  if (last) {
    const image = context.createImageData(form.width, form.height), area = form.width * form.height;
    for (let pixel = 0; pixel < area; pixel++) {
      for (let channel = 0; channel < 3; channel++) {
        image.data[4 * pixel + channel] = Math.round(255 * last.picture[channel * area + pixel]);
      }
      image.data[4 * pixel + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }
  const speed = rate === null ? "" : `, ${rate.toFixed(1)} frames a second`;
  element("status").textContent = `Frame ${number}${speed}; it sees ${short.length} frames in full, ${long.length} in short`;
  element("walks").replaceChildren(...walks.map((_, index) => {
    const button = Object.assign(document.createElement("button"), {textContent: `Walk ${index + 1}`});
    button.className = index === current ? "current" : "";
    button.onclick = () => { current = index; draw(); };
    return button;
  }));
  document.body.dataset.number = number; // for who waits for a frame
}

async function advance(action) {
  const began = performance.now(), walk = walks[current];
  const moment = await world.step(here(), here().last ? action : null, world.noise(seed, here().number));
  walk.push(moment);
  if (walk.length > MOST_MOMENTS) walk.shift();
  const seconds = (performance.now() - began) / 1000;
  rate = rate === null ? 1 / seconds : 1 / (0.8 / rate + 0.2 * seconds);
  draw();
  await new Promise((resolve) => setTimeout(resolve)); // lets the browser paint, and keys come in
}

// One frame for a press, and more while the key is held.
async function play(action) {
  if (busy) { waiting = action; return; }
  busy = true;
  try {
    for (; action !== null; waiting = null) {
      await advance(action);
      action = waiting ?? held;
    }
  } finally {
    busy = false;
  }
}

const verbs = {
  back() { if (!busy && walks[current].length > 1) { walks[current].pop(); draw(); } },
  fork() { if (!busy) { walks.push([...walks[current]]); current = walks.length - 1; draw(); } },
  another() { if (!busy) { seed = (seed + 1) % 2 ** 31; verbs.back(); } },
};

async function start() {
  busy = true;
  rate = null;
  let moment = NOTHING;
  const chosen = form.starts[Number(element("start").value)];
  if (chosen) {
    const strip = await createImageBitmap(await (await fetch(chosen.file)).blob(), {colorSpaceConversion: "none"});
    const reader = new OffscreenCanvas(strip.width, strip.height).getContext("2d");
    reader.drawImage(strip, 0, 0);
    for (let frame = 0; frame * form.height < strip.height; frame++) {
      const {data} = reader.getImageData(0, frame * form.height, form.width, form.height), area = form.width * form.height;
      const picture = Float32Array.from({length: 3 * area}, (_, index) => data[4 * (index % area) + Math.floor(index / area)] / 255);
      moment = await world.see(moment, frame ? chosen.actions[frame - 1] : null, picture);
      element("status").textContent = `Seeing frame ${frame + 1}`;
      await new Promise((resolve) => setTimeout(resolve));
    }
  } else {
    moment = await world.step(moment, null, world.noise(seed, 0));
  }
  walks = [[moment]];
  current = 0;
  busy = false;
  draw();
}

function listen() {
  const keys = new Map(form.actions.flatMap(({keys}, action) => keys.map((key) => [key, action])));
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const verb = {Backspace: "back", f: "fork", n: "another"}[event.key], action = keys.get(SAME_KEYS[event.key] ?? event.key);
    if (verb === undefined && action === undefined) return;
    event.preventDefault();
    if (verb) verbs[verb]();
    else if (!event.repeat) { held = action; play(action); }
  });
  for (const end of ["keyup", "pointerup", "blur"]) {
    addEventListener(end, (event) => {
      held = null;
      if (event.key === " " && event.target.tagName === "BUTTON") event.preventDefault(); // it is not pressed as well
    });
  }
  form.actions.forEach(({name, keys}, action) => {
    const label = keys.length ? `${SIGNS[keys[0]] ?? keys[0]} ${name}` : name;
    const button = Object.assign(document.createElement("button"), {textContent: label, id: `action-${action}`});
    button.onpointerdown = () => { held = action; play(action); };
    element("actions").append(button);
  });
  for (const verb of Object.keys(verbs)) element(verb).onclick = verbs[verb];
  element("start").onchange = start;
  element("precision").onchange = ({target}) => { query.set("precision", target.value); location.search = query; };
}

canvas.width = form.width;
canvas.height = form.height;
element("name").textContent = document.title = form.name;
element("start").append(...form.starts.map(({title}, index) => new Option(title, index)), new Option("From nothing", -1));
element("start").value = query.get("start") ?? element("start").value;
try {
  world = await World.open(form, query.get("precision") ?? form.precisions[0], query.get("provider"), Number(query.get("threads")) || undefined);
  element("precision").append(...form.precisions.map((name) => new Option(name, name, false, name === world.precision)));
  element("machine").textContent =
    `${world.provider}, ${world.threads} thread(s), ${form.num_steps} denoising steps a frame; ` +
    `latents differ from the pipeline's by ${world.difference.toExponential(1)}`;
  listen();
  await start();
  globalThis.far = {world, NOTHING, form, here}; // for tests, and for who is curious
  document.body.dataset.ready = "true";
} catch (error) {
  element("status").textContent = `This browser cannot run the model: ${error.message}`;
  document.body.dataset.failed = error.message;
  throw error;
}
