// One picture on a canvas: window, zoom, pan, and the evidence map over it.

const MAX_ZOOM = 16;
// From no evidence to the most; the ends of the ramp in the legend.
const RAMP = [[0, 40, 11, 84], [0.35, 120, 28, 109], [0.7, 237, 105, 37], [1, 252, 255, 164]];

export class Viewer {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {HTMLOutputElement} readout Shows the value under the pointer.
   * @param {{window?: (center: number, width: number) => void, step?: (by: number) => boolean}} on
   */
  constructor(canvas, readout, on = {}) {
    this.canvas = canvas;
    this.readout = readout;
    this.on = on;
    this.picture = null;
    this.window = { center: -600, width: 1500 };
    this.heat = null;
    this.opacity = 0;
    this.layer = document.createElement("canvas");
    this.pointers = new Map();
    this.home();
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, (event) => this.#up(event));
    }
    canvas.addEventListener("pointerleave", () => (readout.value = ""));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("dblclick", () => this.reset());
  }

  /** @param picture {width, height, channels, pixels, box, inverted}: pixels are Int16Array of HU or bytes. */
  show(picture) {
    this.picture = picture;
    this.#paint();
  }

  setWindow(center, width) {
    this.window = { center, width };
    if (this.isHu) this.#paint();
  }

  get isHu() {
    return this.picture?.pixels instanceof Int16Array;
  }

  /** @param values 14 rows of 14 numbers, or null; @param most what is drawn strongest. */
  setHeat(values, most, opacity) {
    this.opacity = opacity;
    this.heat = values && most > 0 ? heatLayer(values, most) : null;
    this.draw();
  }

  home() {
    this.zoom = 1;
    this.x = this.y = 0;
  }

  reset() {
    this.home();
    this.draw();
  }

  #paint() {
    const { width, height, channels, pixels, inverted } = this.picture;
    const image = new ImageData(width, height);
    const out = new Uint32Array(image.data.buffer);
    if (channels === 3) {
      for (let i = 0, j = 0; i < out.length; i++, j += 3) {
        out[i] = 0xff000000 | (pixels[j + 2] << 16) | (pixels[j + 1] << 8) | pixels[j];
      }
    } else if (this.isHu) {
      // DICOM PS3.3 C.11.2.1.2.1, as chestct.imaging.window.apply_window has it.
      const span = Math.max(this.window.width - 1, 1e-6);
      const floor = this.window.center - 0.5 - span / 2;
      for (let i = 0; i < out.length; i++) {
        const grey = (Math.min(Math.max(((pixels[i] - floor) * 255) / span, 0), 255) + 0.5) & 255;
        out[i] = 0xff000000 | ((inverted ? 255 - grey : grey) * 0x010101);
      }
    } else {
      for (let i = 0; i < out.length; i++) out[i] = 0xff000000 | (pixels[i] * 0x010101);
    }
    this.layer.width = width;
    this.layer.height = height;
    this.layer.getContext("2d").putImageData(image, 0, 0);
    this.draw();
  }

  /** Scale and place of the picture's corner on the canvas, in its own pixels. */
  #place() {
    const { width, height } = this.picture;
    const ratio = devicePixelRatio || 1;
    const w = this.canvas.clientWidth * ratio;
    const h = this.canvas.clientHeight * ratio;
    const scale = Math.min(w / width, h / height) * this.zoom;
    const room = { x: Math.max(0, (width * scale - w) / 2), y: Math.max(0, (height * scale - h) / 2) };
    this.x = Math.min(Math.max(this.x, -room.x), room.x);
    this.y = Math.min(Math.max(this.y, -room.y), room.y);
    return { w, h, ratio, scale, left: (w - width * scale) / 2 + this.x, top: (h - height * scale) / 2 + this.y };
  }

  draw() {
    if (!this.picture || !this.canvas.clientWidth) return;
    const { w, h, scale, left, top } = this.#place();
    const { width, height, box } = this.picture;
    if (this.canvas.width !== Math.round(w) || this.canvas.height !== Math.round(h)) {
      this.canvas.width = Math.round(w);
      this.canvas.height = Math.round(h);
    }
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, w, h);
    context.imageSmoothingEnabled = scale < 6;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.layer, left, top, width * scale, height * scale);
    const frame = [
      left + box.left * width * scale,
      top + box.top * height * scale,
      (box.right - box.left) * width * scale,
      (box.bottom - box.top) * height * scale,
    ];
    if (this.heat && this.opacity > 0) {
      context.save();
      context.beginPath();
      context.rect(...frame);
      context.clip();
      context.globalAlpha = this.opacity;
      context.imageSmoothingEnabled = true;
      context.drawImage(this.heat, ...frame);
      context.restore();
    }
    if (box.left > 0 || box.top > 0 || box.right < 1 || box.bottom < 1) {
      context.strokeStyle = "rgb(108 196 238 / .55)";
      context.setLineDash([6, 6]);
      context.lineWidth = Math.max(1, devicePixelRatio || 1);
      context.strokeRect(...frame);
      context.setLineDash([]);
    }
    this.canvas.style.touchAction = this.zoom > 1 ? "none" : "pan-y";
  }

  #down(event) {
    if (!this.picture) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, event);
    this.pans = event.shiftKey || event.button > 0 || !this.isHu || !this.on.window || (event.pointerType === "touch" && this.zoom > 1);
  }

  #move(event) {
    if (!this.picture) return;
    const before = this.pointers.get(event.pointerId);
    this.#read(event);
    if (!before) return;
    const ratio = devicePixelRatio || 1;
    const dx = event.clientX - before.clientX;
    const dy = event.clientY - before.clientY;
    if (this.pointers.size === 2) {
      const [other] = [...this.pointers.values()].filter((item) => item.pointerId !== event.pointerId);
      const far = (item) => Math.hypot(item.clientX - other.clientX, item.clientY - other.clientY);
      this.zoomBy(far(event) / Math.max(far(before), 1), (event.clientX + other.clientX) / 2, (event.clientY + other.clientY) / 2);
    } else if (this.pans) {
      this.x += dx * ratio;
      this.y += dy * ratio;
      this.draw();
    } else {
      const width = Math.min(Math.max(Math.round(this.window.width + dx * 4), 2), 6000);
      const center = Math.min(Math.max(Math.round(this.window.center + dy * 2), -1500), 3500);
      this.on.window(center, width);
    }
    this.pointers.set(event.pointerId, event);
  }

  #up(event) {
    this.pointers.delete(event.pointerId);
  }

  #read(event) {
    const { ratio, scale, left, top } = this.#place();
    const bounds = this.canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - bounds.left) * ratio - left) / scale);
    const y = Math.floor(((event.clientY - bounds.top) * ratio - top) / scale);
    const { width, height, channels, pixels } = this.picture;
    const isInside = x >= 0 && y >= 0 && x < width && y < height && channels === 1;
    this.readout.value = isInside ? `${pixels[y * width + x]}${this.isHu ? " HU" : " of 255"}` : "";
  }

  #wheel(event) {
    if (!this.picture) return;
    const by = Math.sign(event.deltaY);
    if (!event.ctrlKey && this.on.step?.(by)) {
      event.preventDefault();
      return;
    }
    event.preventDefault();
    this.zoomBy(Math.exp(-Math.max(-60, Math.min(60, event.deltaY)) / 300), event.clientX, event.clientY);
  }

  zoomBy(factor, clientX, clientY) {
    const zoom = Math.min(Math.max(this.zoom * factor, 1), MAX_ZOOM);
    const bounds = this.canvas.getBoundingClientRect();
    const ratio = devicePixelRatio || 1;
    const x = ((clientX ?? bounds.left + bounds.width / 2) - bounds.left - bounds.width / 2) * ratio;
    const y = ((clientY ?? bounds.top + bounds.height / 2) - bounds.top - bounds.height / 2) * ratio;
    this.x = x - ((x - this.x) * zoom) / this.zoom;
    this.y = y - ((y - this.y) * zoom) / this.zoom;
    this.zoom = zoom;
    this.draw();
  }

  #key(event) {
    const far = 40 * (devicePixelRatio || 1);
    const moves = { ArrowLeft: [far, 0], ArrowRight: [-far, 0], ArrowUp: [0, far], ArrowDown: [0, -far] };
    if (event.key in moves && this.zoom > 1) {
      this.x += moves[event.key][0];
      this.y += moves[event.key][1];
      this.draw();
    } else if (event.key === "+" || event.key === "=") this.zoomBy(1.25);
    else if (event.key === "-") this.zoomBy(0.8);
    else if (event.key === "0") this.reset();
    else return;
    event.preventDefault();
  }
}

function heatLayer(values, most) {
  const layer = document.createElement("canvas");
  layer.width = values[0].length;
  layer.height = values.length;
  const image = new ImageData(layer.width, layer.height);
  values.flat().forEach((value, i) => {
    const part = Math.min(Math.max(value / most, 0), 1);
    const k = Math.max(1, RAMP.findIndex(([at]) => at >= part));
    const [from, to] = [RAMP[k - 1], RAMP[k]];
    const t = (part - from[0]) / (to[0] - from[0]);
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = from[c + 1] + t * (to[c + 1] - from[c + 1]);
    image.data[4 * i + 3] = 255 * Math.min(1, part * 1.25);
  });
  layer.getContext("2d").putImageData(image, 0, 0);
  return layer;
}
