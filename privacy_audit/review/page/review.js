// The reviewer's page: shows one pair or one tile at a time, sends each call at once, signs at the end.
// Turning and mirroring are done by hand alike for every pair: a machine's alignment would succeed on copies only,
// and so give away which pairs are suspect.
"use strict";

const byId = (id) => document.getElementById(id);
const KEYS = {
  field: { 1: "same field", 2: "different", 3: "unsure" },
  mark: { 1: "marked", 2: "clean", 3: "unsure" },
};
const OF_PAIRS = ["flip", "swap", "turn", "mirror"];
const view = { place: 0, flip: false, side: "left", turn: 0, mirror: false, zoom: false };
let items = [];
let asks = {};
let calls = new Map();
let busy = false;

const pictureOf = (item, side) => `tile/${item}/${side}.png`;
const openPlace = (from) => {
  for (let step = 0; step < items.length; step++) {
    const place = (from + step) % items.length;
    if (!calls.has(items[place])) return place;
  }
  return -1;
};

function trouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
}

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The review was stopped on this machine. Start it again there; every call so far is kept.");
  }
  const data = await answer.json();
  if (!answer.ok) throw new Error(`${data.message} ${data.hint ?? ""}`);
  return data;
}

function draw() {
  const item = items[view.place];
  const alone = asks[item] === "mark";
  byId("question").textContent = byId("question").dataset[asks[item]];
  for (const side of ["left", "right"]) {
    const picture = byId(side);
    const wanted = pictureOf(item, side);
    if (alone && side === "right") picture.removeAttribute("src");
    else if (picture.getAttribute("src") !== wanted) picture.setAttribute("src", wanted);
  }
  byId("where").textContent = alone ? "tile" : "left";
  byId("field-answers").hidden = alone;
  byId("mark-answers").hidden = !alone;
  for (const tool of OF_PAIRS) byId(tool).hidden = alone;
  byId("right").className = `turn-${view.turn}${view.mirror ? " mirror" : ""}`;
  byId("turned").textContent = "right" + (view.turn ? `, turned ${view.turn * 90}°` : "") + (view.mirror ? ", mirrored" : "");
  const laid = alone ? "side-by-side single" : view.flip ? `flipping on-${view.side}` : "side-by-side";
  byId("pair").className = laid + (view.zoom ? " zoomed" : "");
  byId("flip").setAttribute("aria-pressed", String(view.flip));
  byId("zoom").setAttribute("aria-pressed", String(view.zoom));
  byId("swap").disabled = !view.flip;
  for (const button of document.querySelectorAll("[data-call]")) {
    button.classList.toggle("chosen", calls.get(item) === button.dataset.call);
  }
  byId("place").textContent = String(view.place + 1);
  byId("decided").textContent = String(calls.size);
  byId("bar").value = calls.size;
  byId("ready").hidden = calls.size < items.length;
  const ahead = items[view.place + 1];
  if (ahead) for (const side of asks[ahead] === "mark" ? ["left"] : ["left", "right"]) new Image().src = pictureOf(ahead, side);
}

function go(place) {
  if (place < 0 || place >= items.length) return;
  Object.assign(view, { place, side: "left", turn: 0, mirror: false });
  draw();
}

async function decide(call) {
  if (busy) return;
  busy = true;
  const item = items[view.place];
  try {
    await ask("call", { id: item, call });
    calls.set(item, call);
    trouble("");
    const next = openPlace(view.place);
    if (next >= 0) go(next); else draw();
  } catch (error) {
    trouble(error.message);
  } finally {
    busy = false;
  }
}

async function sign() {
  if (busy || calls.size < items.length) return;
  busy = true;
  try {
    show((await ask("sign", { sign: "all" })).result);
  } catch (error) {
    trouble(error.message);
  } finally {
    busy = false;
  }
}

function show(result) {
  const of = (part) => part.same + part.different + part.unsure;
  const [low, high] = result.decoy_interval;
  byId("agreement").textContent = of(result.decoys)
    ? `${result.decoys.different} of ${of(result.decoys)}, 95 % interval ${low.toFixed(2)} to ${high.toFixed(2)}`
    : "there were none";
  byId("decoys-same").textContent = `${result.decoys.same} of ${of(result.decoys)}`;
  byId("pairs-same").textContent = `${result.pairs.same} of ${of(result.pairs)}`;
  if (result.marks) {
    const all = (part) => part.marked + part.clean + part.unsure;
    byId("marks").textContent = `${result.marks.marked} of ${all(result.marks)}`;
    byId("clean-marked").textContent = `${result.clean.marked} of ${all(result.clean)}`;
    for (const row of document.querySelectorAll(".of-marks")) row.hidden = false;
  }
  byId("file").textContent = result.decisions;
  byId("review").hidden = true;
  byId("result").hidden = false;
}

const ACTS = {
  back: () => go(view.place - 1),
  forth: () => go(view.place + 1),
  next: () => go(openPlace(view.place + 1)),
  flip: () => { view.flip = !view.flip; draw(); },
  swap: () => { if (view.flip) { view.side = view.side === "left" ? "right" : "left"; draw(); } },
  turn: () => { view.turn = (view.turn + 1) % 4; draw(); },
  mirror: () => { view.mirror = !view.mirror; draw(); },
  zoom: () => { view.zoom = !view.zoom; draw(); },
  reset: () => { Object.assign(view, { flip: false, side: "left", turn: 0, mirror: false, zoom: false }); draw(); },
  sign,
};
const ACT_KEYS = {
  ArrowLeft: "back", ArrowRight: "forth", n: "next", f: "flip", " ": "swap", r: "turn", m: "mirror", z: "zoom",
  0: "reset", Enter: "sign",
};

document.addEventListener("keydown", (event) => {
  // A held key must not answer pairs that were never looked at.
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || byId("review").hidden || !items.length) return;
  const asked = asks[items[view.place]];
  const call = KEYS[asked][event.key];
  const act = ACT_KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!call && (!act || (asked === "mark" && OF_PAIRS.includes(act)))) return;
  event.preventDefault();
  if (call) decide(call); else ACTS[act]();
});

for (const button of document.querySelectorAll("button")) {
  button.addEventListener("click", () => {
    button.blur();
    if (button.dataset.call) decide(button.dataset.call); else ACTS[button.id]();
  });
}

ask("state").then((state) => {
  items = state.items;
  asks = state.asks;
  calls = new Map(Object.entries(state.calls));
  if (state.result) return show(state.result);
  go(Math.max(0, openPlace(0)));
  document.body.dataset.ready = "yes";
}).catch((error) => trouble(error.message));
