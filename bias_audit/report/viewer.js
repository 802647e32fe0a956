// Replays the recorded heatmaps over the samples, and keeps the page up to date while training runs.
// Enters: the compressed data in #data, made by samples.py, and pictures.js. Leaves: the tiles of #samples and the
// dialog.
"use strict";
(() => {
  const { $, PAGE, unpack, element, drawn, named } = pictures;
  const STORE = `bias-audit ${document.body.dataset.run} ${location.pathname}`;
  const RELOAD_MS = 10000, QUIET_MS = 4000, FIELD = 56;

  const state = Object.assign(
    // `frame: null` follows the newest audit.
    { frame: null, method: 0, region: "spurious", sort: "share", class: "", group: "", shows: "", correct: "",
      opacity: 70, outlines: true, limit: PAGE, scroll: 0, details: [] },
    recall());
  let playing = 0, lastTouch = 0;

  function recall() {
    try {
      return JSON.parse(sessionStorage.getItem(STORE)) || {};
    } catch {
      return {}; // Storage may be forbidden for files: the page then starts anew.
    }
  }

  function remember() {
    state.scroll = scrollY;
    state.details = [...document.querySelectorAll("details[open][id]")].map((d) => d.id);
    try {
      sessionStorage.setItem(STORE, JSON.stringify(state));
    } catch { /* as above */ }
  }

  // ---- data ----------------------------------------------------------------------------------------------------

  // The samples and frames, with what is at their places.
  async function load(text) {
    const { data, part, picture } = await unpack(text);
    const words = (place) => new Int16Array(part(place).slice().buffer);
    // The upper halves of float32 numbers: first all their high bytes, then all their low ones.
    const shorts = (place) => {
      const raw = part(place), count = raw.length / 2;
      const bits = Uint32Array.from({ length: count }, (_, i) => (raw[i] << 24) | (raw[count + i] << 16));
      return new Float32Array(bits.buffer);
    };
    for (const frame of data.frames) {
      frame.maps = frame.maps.map(part);
      frame.shares = shorts(frame.shares);
      frame.magnitude = shorts(frame.magnitude);
      frame.margin = shorts(frame.margin);
      frame.predicted = words(frame.predicted);
      frame.effects &&= shorts(frame.effects);
    }
    data.samples.forEach((sample, i) => Object.assign(sample, { index: i, image: picture(sample.image), changed: [] }));
    for (const change of data.changed) {
      data.samples[change.sample].changed.push(Object.assign(change, { image: picture(change.image) }));
    }
    return data;
  }

  const isSpurious = (region) => region.role === "spurious";

  // Of one region, or of all spurious ones at once: the values that are numbers, put together; NaN where none is.
  function over(data, region, value, together) {
    if (region !== "spurious") return value(Number(region));
    const parts = data.regions.flatMap((r, k) => (isSpurious(r) ? [value(k)] : [])).filter((v) => !isNaN(v));
    return parts.length ? together(parts) : NaN;
  }

  // Share of the heatmap on one region, or summed over the spurious ones; NaN where it is not valid.
  function share(data, f, m, i, region) {
    const at = (r) => data.frames[f].shares[(m * data.samples.length + i) * data.regions.length + r];
    return over(data, region, at, (parts) => Math.min(1, parts.reduce((a, b) => a + b)));
  }

  // By how much the decided class's margin falls without one region, or without the spurious one that matters most.
  function effect(data, f, i, region) {
    const { effects } = data.frames[f], count = effects ? effects.length / data.samples.length : 0;
    return over(data, region, (r) => (r < count ? effects[i * count + r] : NaN), (parts) => Math.max(...parts));
  }

  const magnitude = (data, f, m, i) => data.frames[f].magnitude[m * data.samples.length + i];
  const percent = (v) => (isNaN(v) ? "–" : `${(100 * v).toFixed(v < 0.0995 ? 1 : 0)} %`);
  const fixed = (v, digits) => (Number.isFinite(v) ? v.toFixed(digits).replace("-", "−") : "–");
  const signed = (v) => (v > 0 ? "+" : "") + fixed(v, 2);
  const className = (data, k) => (k < 0 ? "–" : data.classes[k] ?? `class ${k}`);

  function strength(data, f, m, i) {
    const own = magnitude(data, f, m, i), typical = data.frames[f].typical[m];
    if (!Number.isFinite(own)) return "not measured";
    if (own === 0) return "silent";
    const ratio = own / typical; // A map that is not silent has a median map to be compared with.
    return ratio < 0.01 ? "< 0.01×" : `${ratio.toFixed(ratio < 10 ? 2 : 0)}×`;
  }

  // ---- drawing -------------------------------------------------------------------------------------------------

  const INFERNO = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];

  // RGBA for each of 256 levels: colours between the stops, and nothing at all where the map is zero.
  const COLOURS = new Uint8ClampedArray(1024);
  for (let code = 0; code < 256; code++) {
    const place = (code / 255) * (INFERNO.length - 1), k = Math.min(Math.floor(place), INFERNO.length - 2);
    const [from, to] = [INFERNO[k], INFERNO[k + 1]];
    for (let c = 0; c < 3; c++) COLOURS[4 * code + c] = from[c] + (place - k) * (to[c] - from[c]);
    COLOURS[4 * code + 3] = Math.min(255, 1.5 * code);
  }

  // For each of FIELD output cells the two map cells between which it lies and the weight of the second: bilinear with
  // align_corners=False, as the tool itself upsamples.
  const lattices = new Map();
  function lattice(size) {
    if (!lattices.has(size)) {
      lattices.set(size, Array.from({ length: FIELD }, (_, i) => {
        const place = Math.max(0, ((i + 0.5) * size) / FIELD - 0.5), low = Math.min(Math.floor(place), size - 1);
        return [low, Math.min(low + 1, size - 1), place - low];
      }));
    }
    return lattices.get(size);
  }

  function paint(data, canvas, f, m, i) {
    const frame = data.frames[f], [height, width] = frame.size, map = frame.maps[m], start = i * height * width;
    const context = canvas.getContext("2d"), picture = context.createImageData(FIELD, FIELD);
    const rows = lattice(height), columns = lattice(width);
    let at = 0;
    for (const [top, bottom, down] of rows) {
      for (const [left, right, along] of columns) {
        const upper = map[start + top * width + left] * (1 - along) + map[start + top * width + right] * along;
        const lower = map[start + bottom * width + left] * (1 - along) + map[start + bottom * width + right] * along;
        const code = 4 * Math.round(((upper * (1 - down) + lower * down) * 255) / data.levels);
        for (let c = 0; c < 4; c++) picture.data[at++] = COLOURS[code + c];
      }
    }
    context.putImageData(picture, 0, 0);
    canvas.parentElement.classList.toggle("silent", magnitude(data, f, m, i) === 0);
  }

  // Picture, heatmap and outlines on top of each other.
  function stack(data, sample, heat = true) {
    const over = heat ? [element("canvas", { width: FIELD, height: FIELD })] : [];
    return pictures.stack(data.regions, sample, ...over);
  }

  // ---- the viewer ----------------------------------------------------------------------------------------------

  function view(data) {
    const last = data.frames.length - 1, tiles = new Map();
    const spurious = data.regions.filter(isSpurious).map((r) => r.name);
    const firstSpurious = data.regions.findIndex(isSpurious);
    const intervened = data.frames.findLastIndex((frame) => frame.effects);
    const frameNow = () => Math.min(state.frame ?? last, last);
    const isRight = (sample) => data.frames[last].predicted[sample.index] === sample.label;
    let open = null;

    function describe(f) {
      const { step, epoch, weights } = data.frames[f];
      return `step ${step}, epoch ${epoch}, ${weights} weights (${f + 1} of ${last + 1})`;
    }

    function option(select, value, text) {
      select.append(element("option", { value, textContent: text }));
    }

    function prepare() {
      data.methods.forEach((name, m) => option($("method"), m, name));
      if (spurious.length > 1) option($("region"), "spurious", `spurious (${spurious.join(" + ")})`);
      data.regions.forEach((r, k) => {
        option($("region"), k, r.role ? `${r.name} (${r.role})` : r.name);
        if (r.role) option($("shows"), k, r.name);
      });
      if (intervened < 0) $("sort").querySelector("[value=effect]").remove();
      data.classes.forEach((name, k) => option($("class"), k, name));
      data.attributes.forEach((attribute, a) => attribute.values.forEach((value) =>
        option($("group"), JSON.stringify([a, value]), `${attribute.name} = ${value}`)));
      for (const id of ["method", "region", "sort", "class", "group", "shows", "correct"]) {
        $(id).value = state[id];
        // What was remembered, or "all spurious", may not be among this run's options.
        if ($(id).selectedIndex < 0) $(id).value = id === "region" ? Math.max(0, firstSpurious) : "";
        if ($(id).selectedIndex < 0) $(id).selectedIndex = 0;
        state[id] = $(id).value;
        $(id).addEventListener("change", () => {
          state[id] = $(id).value;
          state.limit = PAGE;
          arrange();
        });
      }
      for (const id of ["audit", "detail-audit"]) {
        $(id).max = last;
        $(id).addEventListener("input", () => {
          stop();
          go(Number($(id).value));
        });
      }
      $("opacity").value = state.opacity;
      $("opacity").addEventListener("input", () => {
        state.opacity = Number($("opacity").value);
        dress();
      });
      $("outlines").checked = state.outlines;
      $("outlines").addEventListener("change", () => {
        state.outlines = $("outlines").checked;
        dress();
      });
      $("play").disabled = last === 0;
      $("play").addEventListener("click", () => (playing ? stop() : play()));
      $("more").addEventListener("click", () => {
        state.limit += PAGE;
        arrange();
      });
      for (const link of document.querySelectorAll("[data-region]")) {
        link.addEventListener("click", () => {
          const k = data.regions.findIndex((r) => r.name === link.dataset.region);
          $("region").value = state.region = String(k);
          $("sort").value = state.sort = "share";
          arrange();
        });
      }
      for (const [id, step] of [["previous", -1], ["next", 1]]) {
        $(id).addEventListener("click", () => show(shown[shown.findIndex((t) => t.sample === open.sample) + step].sample));
      }
      $("close").addEventListener("click", () => $("detail").close());
      $("detail").addEventListener("close", () => { open = null; });
      explainColours();
    }

    function explainColours() {
      const ramp = $("ramp").getContext("2d"), pixels = ramp.createImageData(128, 1);
      for (let x = 0; x < 128; x++) pixels.data.set(COLOURS.subarray(8 * x, 8 * x + 4), 4 * x);
      ramp.putImageData(pixels, 0, 0);
      $("outline-key").append(...data.regions.filter((r) => r.role).map(named));
    }

    function dress() {
      document.body.style.setProperty("--heat", state.opacity / 100);
      document.body.classList.toggle("no-outlines", !state.outlines);
    }

    function wanted(sample) {
      if (state.class !== "" && sample.label !== Number(state.class)) return false;
      if (state.correct !== "" && isRight(sample) !== (state.correct === "yes")) return false;
      if (state.shows !== "" && sample.areas[state.shows] === null) return false;
      if (state.group === "") return true;
      const [attribute, value] = JSON.parse(state.group);
      return sample.attributes[attribute] === value;
    }

    function sorted(samples) {
      const m = Number(state.method), now = (s) => share(data, last, m, s.index, state.region);
      const rise = (s) => now(s) - share(data, 0, m, s.index, state.region);
      const byId = (a, b) => a.id.localeCompare(b.id, "en", { numeric: true });
      if (state.sort === "id") return samples.sort(byId);
      const without = (s) => effect(data, intervened, s.index, state.region);
      const key = new Map(samples.map((s) => [s, { share: now, change: rise, effect: without }[state.sort](s)]));
      // What has no score comes last.
      const rank = (s) => (isNaN(key.get(s)) ? -Infinity : key.get(s));
      return samples.sort((a, b) => (rank(b) > rank(a)) - (rank(b) < rank(a)) || byId(a, b));
    }

    function tileOf(sample) {
      if (!tiles.has(sample.index)) {
        const parts = { told: element("span", { className: "told" }), score: element("span", { className: "told" }),
          bar: element("i"), stack: stack(data, sample) };
        const button = element("button", { type: "button", className: "tile", title: sample.id }, parts.stack,
          element("span", { className: "name", textContent: sample.id }), parts.told,
          element("span", { className: "meter" }, parts.bar), parts.score);
        button.dataset.id = sample.id;
        button.addEventListener("click", () => show(sample));
        tiles.set(sample.index, { item: element("li", {}, button), canvas: parts.stack.querySelector("canvas"), sample,
          ...parts });
      }
      return tiles.get(sample.index);
    }

    let shown = [];
    function arrange() {
      const all = sorted(data.samples.filter(wanted));
      shown = all.slice(0, state.limit).map(tileOf);
      $("grid").replaceChildren(...shown.map((tile) => tile.item));
      $("count").textContent = `${all.length} of ${data.samples.length} samples` +
        (shown.length < all.length ? `, the first ${shown.length} shown` : "");
      $("more").hidden = shown.length === all.length;
      $("more").textContent = `Show ${Math.min(PAGE, all.length - shown.length)} more`;
      refresh();
    }

    function refresh() {
      const f = frameNow(), m = Number(state.method);
      const { hue } = data.regions[state.region === "spurious" ? firstSpurious : state.region];
      for (const id of ["audit", "detail-audit"]) {
        $(id).value = f;
        $(id).setAttribute("aria-valuetext", describe(f));
        $(`${id}-text`).textContent = describe(f);
      }
      for (const tile of shown) {
        const { sample } = tile, i = sample.index, predicted = data.frames[f].predicted[i];
        paint(data, tile.canvas, f, m, i);
        const right = predicted === sample.label, label = className(data, sample.label);
        tile.told.textContent = right ? `✓ ${label}` : `✗ ${label} → ${className(data, predicted)}`;
        tile.told.title = `label ${label}, predicted ${className(data, predicted)}`;
        tile.told.classList.toggle("wrong", !right);
        const value = share(data, f, m, i, state.region);
        tile.bar.style.background = `var(--${hue})`;
        tile.bar.style.width = `${100 * (value || 0)}%`;
        if (state.sort === "effect") {
          const fall = effect(data, intervened, i, state.region);
          tile.score.title = `by how much the decided class’s margin falls without the region, beyond a control region, at step ${data.frames[intervened].step}`;
          tile.score.textContent = isNaN(fall) ? "not removed" : `margin ${signed(-fall)} without`;
        } else {
          tile.score.title = "share of the heatmap · strength of the map, 1× being the median map of this audit";
          tile.score.textContent = `${percent(value)} · ${strength(data, f, m, i)}`;
        }
      }
      if (open) detail();
    }

    function go(f) {
      state.frame = f === last ? null : f;
      refresh();
    }

    function play() {
      if (frameNow() === last) go(0);
      // A long run is replayed in about fifteen seconds, a short one slowly enough to follow.
      playing = setInterval(() => {
        go(frameNow() + 1);
        if (frameNow() === last) stop();
      }, Math.max(150, Math.min(900, 15000 / (last + 1))));
      $("play").setAttribute("aria-pressed", "true");
      $("play-word").textContent = "Pause";
    }

    function stop() {
      clearInterval(playing);
      playing = 0;
      $("play").setAttribute("aria-pressed", "false");
      $("play-word").textContent = "Play";
    }

    // ---- one sample in full --------------------------------------------------------------------------------------

    function show(sample) {
      open = { sample, stacks: data.methods.map(() => stack(data, sample)), told: data.methods.map(() => element("small")) };
      $("detail-title").textContent = sample.id;
      const groups = data.attributes.map((a, k) => `${a.name} = ${sample.attributes[k] || "–"}`);
      $("detail-facts").textContent = [`label ${className(data, sample.label)}`, ...groups].join(" · ");
      const plain = element("figure", {}, element("figcaption", { textContent: "Image and regions" }),
        stack(data, sample, false));
      $("detail-maps").replaceChildren(plain, ...data.methods.map((name, m) => element("figure", {},
        element("figcaption", { textContent: name }), open.stacks[m], open.told[m])));
      $("detail-changes").hidden = !sample.changed.length;
      $("detail-changed").replaceChildren(...sample.changed.length ? [before(sample), ...sample.changed.map(after)] : []);
      const place = shown.findIndex((tile) => tile.sample === sample);
      $("previous").disabled = place <= 0;
      $("next").disabled = place < 0 || place === shown.length - 1;
      refresh();
      if (!$("detail").open) $("detail").showModal();
    }

    // Without outlines, which would hide what has changed.
    function pictured(sample, image, title, text) {
      return element("figure", {}, element("figcaption", { textContent: title }),
        stack(data, { ...sample, image, outlines: [] }, false), element("small", { textContent: text }));
    }

    function before(sample) {
      const [{ step }] = sample.changed, frame = data.frames.find((f) => f.step === step);
      return pictured(sample, sample.image, "As it is",
        frame ? `decided at step ${step}: ${className(data, frame.predicted[sample.index])}` : `at step ${step}`);
    }

    function after({ sample, kind, region, attribute, value, decision, fall, image }) {
      const title = kind === "removal" ? `Without ${region}` :
        `As ${attribute} = ${value}${region ? `, by another image’s ${region}` : ""}`;
      return pictured(data.samples[sample], image, title,
        `decided: ${className(data, decision)}; the label’s margin ${signed(-fall)}`);
    }

    // The shares of one sample at every audit; the upright line is the audit that is shown.
    function course(i, m, now) {
      const steps = data.frames.map((frame) => frame.step), first = steps[0], span = steps[last] - first || 1;
      const x = (f) => (100 * (steps[f] - first)) / span, y = (v) => 40 * (1 - v);
      const lines = data.regions.map(({ role, hue }, r) => {
        let d = "";
        steps.forEach((_, f) => {
          const value = share(data, f, m, i, r);
          if (!isNaN(value)) d += `${d ? "L" : "M"}${x(f).toFixed(2)} ${y(value).toFixed(2)}`;
        });
        return drawn("path", { d, class: role, style: `stroke: var(--${hue})` });
      });
      return drawn("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", "aria-hidden": "true" },
        ...lines, drawn("path", { class: "now", d: `M${x(now)} 0V40` }));
    }

    function detail() {
      const { sample, stacks, told } = open, i = sample.index, now = frameNow(), m = Number(state.method);
      stacks.forEach((box, k) => {
        paint(data, box.querySelector("canvas"), now, k, i);
        told[k].textContent = `strength: ${strength(data, now, k, i)}`;
      });
      if (last > 0) $("detail-course").replaceChildren(course(i, m, now));
      $("course-title").textContent = `Share of the heatmap, 0 to 100 %, from step ${data.frames[0].step} to ${data.frames[last].step}`;
      $("course").hidden = last === 0;
      const cell = (text, number) => element("td", { textContent: text, className: number ? "number" : "" });
      const head = ["step", "predicted", "margin", ...data.regions.map((r) => r.name), "magnitude"];
      const rows = data.frames.map((frame, f) => {
        const shares = data.regions.map((_, r) => {
          const value = share(data, f, m, i, r), area = sample.areas[r];
          return cell(percent(value) + (area && !isNaN(value) ? ` (${(value / area).toFixed(1)}×)` : ""), true);
        });
        const strengthNow = magnitude(data, f, m, i);
        const row = element("tr", {}, cell(frame.step), cell(className(data, frame.predicted[i])),
          cell(fixed(frame.margin[i], 2), true), ...shares,
          cell(Number.isFinite(strengthNow) ? (strengthNow === 0 ? "silent" : strengthNow.toPrecision(3)) : "–", true));
        if (f === now) row.setAttribute("aria-current", "true");
        return row;
      });
      $("detail-table").replaceChildren(
        element("caption", { className: "how", textContent:
          `${data.methods[m]}: share of the heatmap by region (× its share of the image); margin is the label’s logit minus the largest other.` }),
        element("thead", {}, element("tr", {}, ...head.map((text, k) =>
          element("th", { textContent: text, className: k > 1 ? "number" : "" })))),
        element("tbody", {}, ...rows));
    }

    prepare();
    dress();
    $("viewer").hidden = false;
    arrange();
  }

  // ---- staying up to date ----------------------------------------------------------------------------------------

  // A page of a running training reloads, but never under the reader's hands.
  function follow() {
    for (const event of ["pointerdown", "keydown", "input", "wheel"]) {
      addEventListener(event, () => { lastTouch = Date.now(); }, { passive: true });
    }
    setInterval(() => {
      if (playing || $("detail").open || Date.now() - lastTouch < QUIET_MS) return;
      remember();
      location.reload();
    }, RELOAD_MS);
  }

  async function begin() {
    if ($("data") && typeof DecompressionStream === "undefined") {
      $("too-old").hidden = false;
    } else if ($("data")) {
      view(await load($("data").textContent));
    }
    for (const id of state.details) if ($(id)) $(id).open = true;
    if ("live" in document.body.dataset) {
      follow();
      history.scrollRestoration = "manual";
      scrollTo(0, state.scroll);
    }
    addEventListener("pagehide", remember);
    document.body.dataset.ready = "";
  }

  begin();
})();
