// Shows a picture under its segments and lets the visitor choose some of them. `gr.HTML` gives element, trigger, props
// and watch. Everything that needs no map of the server's (opacity, outlines, names, the choice) happens here at once.
const part = (name) => element.querySelector(".viewer-" + name);
const LEAST_SIDE = 640; // canvas pixels of the longer side; small pictures are enlarged by a whole factor
let places = null; // Uint16Array [height * width]: 0 void, otherwise place in `segments`, from 1
let shown = null;
let chosen = new Set(); // ids

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint16Array(await new Response(stream).arrayBuffer()); // little-endian, as every browser's machine is
}

function loaded(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = url;
  });
}

function drawTint() {
  // light and shade of the picture stay, its own colours would mix with the segments'
  const { width, height, segments } = shown, canvas = part("tint");
  const small = new OffscreenCanvas(width, height), context = small.getContext("2d");
  context.drawImage(part("picture"), 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height), data = pixels.data;
  for (let i = 0; i < places.length; i++) {
    const segment = segments[places[i] - 1], at = 4 * i;
    if (!segment || segment.hidden) {
      data[at + 3] = 0;
      continue;
    }
    const grey = (data[at] + data[at + 1] + data[at + 2]) / 3, relief = 0.55 + grey / 280;
    for (let c = 0; c < 3; c++) data[at + c] = segment.color[c] * relief;
    data[at + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  const target = canvas.getContext("2d");
  target.imageSmoothingEnabled = false;
  target.clearRect(0, 0, canvas.width, canvas.height);
  target.drawImage(small, 0, 0, canvas.width, canvas.height);
  canvas.style.opacity = part("opacity").value / 100;
}

function drawLines() {
  const canvas = part("lines"), context = canvas.getContext("2d");
  const { width, height, segments } = shown, scale = canvas.width / width;
  const thick = Math.max(1.5, canvas.width / 400);
  context.clearRect(0, 0, canvas.width, canvas.height);
  const all = part("outlines").checked;
  const seen = [false, ...segments.map((each) => !each.hidden && all)];
  const picked = [false, ...segments.map((each) => chosen.has(each.id))];
  const strokes = [[new Path2D(), new Path2D()], [new Path2D(), new Path2D()]]; // [outlines, chosen], each dark and light
  const edge = (one, other, x0, y0, x1, y1) => {
    if (one === other) return;
    const kind = picked[one] || picked[other] ? 1 : seen[one] || seen[other] ? 0 : -1;
    if (kind < 0) return;
    for (const path of strokes[kind]) {
      path.moveTo(x0 * scale, y0 * scale);
      path.lineTo(x1 * scale, y1 * scale);
    }
  };
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const place = places[y * width + x];
      if (x + 1 < width) edge(place, places[y * width + x + 1], x + 1, y, x + 1, y + 1);
      if (y + 1 < height) edge(place, places[(y + 1) * width + x], x, y + 1, x + 1, y + 1);
      else if (picked[place]) edge(place, 0, x, height, x + 1, height);
      if (y === 0 && picked[place]) edge(place, 0, x, 0, x + 1, 0);
      if (x === 0 && picked[place]) edge(place, 0, 0, y, 0, y + 1);
      if (x + 1 === width && picked[place]) edge(place, 0, width, y, width, y + 1);
    }
  }
  context.lineCap = "square";
  strokes.forEach(([dark, light], kind) => {
    for (const [path, color, more] of [[dark, "rgba(0, 0, 0, 0.7)", 1.2], [light, kind ? "#ffe14d" : "#fff", 0]]) {
      context.strokeStyle = color;
      context.lineWidth = thick * (kind ? 2 : 0.8) + more;
      context.stroke(path);
    }
  });
}

function listSegments() {
  const list = part("segments");
  list.replaceChildren(
    ...shown.segments.map((each) => {
      const item = document.createElement("li"), button = document.createElement("button");
      const swatch = document.createElement("span"), share = document.createElement("small");
      button.type = "button";
      button.dataset.id = each.id;
      button.className = each.hidden ? "is-hidden" : "";
      swatch.className = "viewer-swatch";
      swatch.style.background = `rgb(${each.color.join(",")})`;
      share.textContent = each.about + (each.hidden ? ", hidden" : "");
      button.append(swatch, each.label, share);
      button.addEventListener("click", () => toggle(each.id));
      button.addEventListener("mouseenter", () => mark(each.id));
      button.addEventListener("mouseleave", () => mark(null));
      item.append(button);
      return item;
    }),
  );
}

function mark(id) {
  for (const button of part("segments").querySelectorAll("button")) {
    button.classList.toggle("is-under", button.dataset.id === String(id));
  }
}

function showChoice() {
  const names = shown.segments.filter((each) => chosen.has(each.id)).map((each) => each.label);
  part("chosen").textContent = names.length
    ? "Chosen: " + names.join(", ")
    : shown.editable ? "Click segments, in the picture or in the list, to choose them." : "";
  const least = { hide: 1, merge: 2, clear: 1, recolour: 1, rename: 1 };
  for (const button of part("tools").querySelectorAll("button")) {
    const action = button.dataset.action;
    button.disabled = action === "undo" ? !shown.undo : chosen.size < least[action] || (action === "rename" && chosen.size > 1);
  }
  for (const button of part("segments").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", chosen.has(Number(button.dataset.id)));
    button.disabled = !shown.editable;
  }
}

function toggle(id) {
  if (!shown.editable) return;
  if (!chosen.delete(id)) chosen.add(id);
  if (chosen.size === 1) {
    const only = shown.segments.find((each) => chosen.has(each.id));
    part("name").value = only.name;
    part("color").value = "#" + only.color.map((value) => value.toString(16).padStart(2, "0")).join("");
  }
  drawLines();
  showChoice();
}

function segmentAt(event) {
  if (!places) return null;
  const box = part("lines").getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * shown.width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * shown.height);
  if (x < 0 || y < 0 || x >= shown.width || y >= shown.height) return null;
  return shown.segments[places[y * shown.width + x] - 1] || null;
}

async function show() {
  const value = props.value;
  part("empty").hidden = Boolean(value);
  part("full").hidden = !value;
  if (!value) {
    shown = places = null;
    chosen = new Set();
    return;
  }
  const [map, picture] = await Promise.all([unpacked(value.map), loaded(value.picture)]);
  if (props.value !== value) return; // a newer one came meanwhile
  const other = !shown || shown.result !== value.result;
  [shown, places] = [value, map];
  const ids = new Set(value.segments.map((each) => each.id));
  chosen = new Set(other ? [] : [...chosen].filter((id) => ids.has(id)));
  const factor = Math.max(1, Math.floor(LEAST_SIDE / Math.max(value.width, value.height)));
  for (const name of ["picture", "tint", "lines"]) {
    part(name).width = value.width * factor;
    part(name).height = value.height * factor;
  }
  const context = part("picture").getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, 0, 0, part("picture").width, part("picture").height);
  part("stage").style.aspectRatio = `${value.width} / ${value.height}`;
  part("stage").style.setProperty("--shape", value.width / value.height);
  part("stage").setAttribute("aria-label", `Picture with ${value.segments.length} segments, which are listed below`);
  part("tools").hidden = !value.editable;
  listSegments();
  drawTint();
  drawLines();
  showChoice();
  element.querySelector(".viewer").dataset.result = value.result;
}

part("opacity").addEventListener("input", () => { part("tint").style.opacity = part("opacity").value / 100; });
part("outlines").addEventListener("change", () => shown && drawLines());
part("stage").addEventListener("mousemove", (event) => {
  const segment = segmentAt(event), tip = part("tip"), box = part("stage").getBoundingClientRect();
  tip.hidden = !segment;
  mark(segment && segment.id);
  if (!segment) return;
  tip.textContent = segment.label + (segment.hidden ? " (hidden)" : "");
  const left = event.clientX - box.left + 14;
  tip.style.left = Math.max(0, Math.min(left, box.width - tip.offsetWidth - 4)) + "px";
  tip.style.top = Math.max(0, event.clientY - box.top - 34) + "px";
});
part("stage").addEventListener("mouseleave", () => { part("tip").hidden = true; mark(null); });
part("stage").addEventListener("click", (event) => { const segment = segmentAt(event); if (segment) toggle(segment.id); });
part("name").addEventListener("keydown", (event) => {
  if (event.key === "Enter") element.querySelector("[data-action=rename]").click();
});
part("tools").addEventListener("click", (event) => {
  const action = event.target.dataset.action;
  if (!action) return;
  if (action === "clear") {
    chosen.clear();
    drawLines();
    showChoice();
    return;
  }
  trigger("edit", { action, ids: [...chosen], name: part("name").value, color: part("color").value });
});
watch("value", show);
show();
