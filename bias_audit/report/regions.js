// Shows the images of a region check, those first that a check names, with the outlines of their regions.
// Enters: the compressed data in #data, made by regions.py, and pictures.js. Leaves: the tiles of #images, the dialog.
"use strict";
(() => {
  const { $, PAGE, unpack, element, stack, named } = pictures;
  const state = { check: "", region: "", class: "", group: "", limit: PAGE };
  const percent = (v) => `${(100 * v).toFixed(v < 0.0995 ? 1 : 0)} %`;

  async function load(text) {
    const { data, picture } = await unpack(text);
    for (const sample of data.samples) sample.image = picture(sample.image);
    return data;
  }

  function view(data) {
    // The outlines of other annotators follow those of the set, or of the first.
    const own = data.regions.filter((region) => !region.annotator);
    const tiles = new Map();
    let shown = [], open = null;

    // What the chosen check, or any, says of an image.
    const said = (sample) => sample.flags.filter(([check]) => state.check === "" || check === Number(state.check));
    const isBad = ([check]) => data.checks[check].state === "violated";

    function option(select, value, text) {
      select.append(element("option", { value, textContent: text }));
    }

    function prepare() {
      data.checks.forEach(({ code }, k) => {
        const count = data.samples.filter((sample) => sample.flags.some(([check]) => check === k)).length;
        if (count) option($("check"), k, `${code} (${count})`);
      });
      own.forEach((region, k) => option($("region"), k, region.role ? `${region.name} (${region.role})` : region.name));
      data.classes.forEach((name, k) => option($("class"), k, name));
      data.attributes.forEach((attribute, a) => attribute.values.forEach((value) =>
        option($("group"), JSON.stringify([a, value]), `${attribute.name} = ${value}`)));
      for (const id of ["check", "region", "class", "group"]) {
        $(id).addEventListener("change", () => choose({ [id]: $(id).value }));
      }
      $("outlines").addEventListener("change", () => {
        document.body.classList.toggle("no-outlines", !$("outlines").checked);
      });
      $("more").addEventListener("click", () => {
        state.limit += PAGE;
        arrange();
      });
      for (const link of document.querySelectorAll("[data-check]")) {
        link.addEventListener("click", () => {
          const k = data.checks.findIndex(({ code }) => code === link.dataset.check);
          choose({ check: String(k), region: "", class: "", group: "" });
        });
      }
      for (const [id, step] of [["previous", -1], ["next", 1]]) {
        $(id).addEventListener("click", () => show(shown[shown.indexOf(open) + step]));
      }
      $("close").addEventListener("click", () => $("detail").close());
      $("outline-key").append(...own.map(named));
    }

    function choose(values) {
      Object.assign(state, values, { limit: PAGE });
      for (const id of Object.keys(values)) $(id).value = values[id];
      arrange();
    }

    function wanted(sample) {
      if (state.check !== "" && !said(sample).length) return false;
      if (state.region !== "" && sample.areas[state.region] === null) return false;
      if (state.class !== "" && sample.label !== Number(state.class)) return false;
      if (state.group === "") return true;
      const [attribute, value] = JSON.parse(state.group);
      return sample.attributes[attribute] === value;
    }

    // Of one check the worst first, as it named them.
    function sorted(samples) {
      if (state.check === "") return samples;
      const rank = (sample) => Math.min(...said(sample).map(([, place]) => place));
      return samples.sort((a, b) => rank(a) - rank(b));
    }

    function about(sample) {
      const groups = data.attributes.map((a, k) => (sample.attributes[k] ? `${a.name} = ${sample.attributes[k]}` : ""));
      return [data.classes[sample.label] ?? "", ...groups].filter(Boolean).join(" · ");
    }

    function tileOf(sample) {
      if (!tiles.has(sample)) {
        const told = element("span", { className: "told flags" });
        const button = element("button", { type: "button", className: "tile", title: sample.id },
          stack(data.regions, sample), element("span", { className: "name", textContent: sample.id }), told,
          element("span", { className: "told", textContent: about(sample) }));
        button.dataset.id = sample.id;
        button.addEventListener("click", () => show(sample));
        tiles.set(sample, { item: element("li", {}, button), told });
      }
      return tiles.get(sample);
    }

    function arrange() {
      const all = sorted(data.samples.filter(wanted));
      shown = all.slice(0, state.limit);
      $("grid").replaceChildren(...shown.map((sample) => {
        const { item, told } = tileOf(sample), flags = said(sample);
        told.textContent = flags.length ? flags[0][3] + (flags.length > 1 ? `, and ${flags.length - 1} more` : "") : "";
        told.title = flags.map((flag) => flag[3]).join("\n");
        told.classList.toggle("wrong", flags.some(isBad));
        return item;
      }));
      $("count").textContent = `${all.length} of ${data.samples.length} images` +
        (shown.length < all.length ? `, the first ${shown.length} shown` : "");
      $("more").hidden = shown.length === all.length;
      $("more").textContent = `Show ${Math.min(PAGE, all.length - shown.length)} more`;
    }

    // What one annotator drew of an image.
    function figure(sample, title, annotator) {
      const outlines = sample.outlines.map((d, r) => (data.regions[r].annotator === annotator ? d : ""));
      return element("figure", {}, element("figcaption", { textContent: title }),
        stack(data.regions, { ...sample, outlines }));
    }

    function show(sample) {
      open = sample;
      $("detail-title").textContent = sample.id;
      $("detail-facts").textContent = about(sample);
      const figures = sample.seen_by.map((annotator) => figure(sample, data.annotators[annotator], annotator));
      $("detail-maps").replaceChildren(...(data.annotators.length ? figures : [figure(sample, "", 0)]));
      $("detail-said").replaceChildren(...sample.flags.map((flag) => element("li",
        { textContent: `${data.checks[flag[0]].code}: ${flag[3]}`, className: isBad(flag) ? "wrong" : "" })));
      const cell = (text, number) => element("td", { textContent: text, className: number ? "number" : "" });
      const rows = own.map((region, k) => [region, sample.areas[k], sample.boxed[k]])
        .filter(([, area]) => area !== null)
        .map(([{ name, role }, area, boxed]) => element("tr", {}, cell(name), cell(role || "–"),
          cell(boxed ? "box" : "outline"), cell(percent(area), true)));
      $("detail-table").replaceChildren(
        element("thead", {}, element("tr", {}, ...["region", "role", "drawn as", "share of the image"].map((text, k) =>
          element("th", { textContent: text, className: k > 2 ? "number" : "" })))),
        element("tbody", {}, ...rows));
      const place = shown.indexOf(sample);
      $("previous").disabled = place <= 0;
      $("next").disabled = place < 0 || place === shown.length - 1;
      if (!$("detail").open) $("detail").showModal();
    }

    prepare();
    $("viewer").hidden = false;
    arrange();
  }

  async function begin() {
    if ($("data") && typeof DecompressionStream === "undefined") {
      $("too-old").hidden = false;
    } else if ($("data")) {
      view(await load($("data").textContent));
    }
    document.body.dataset.ready = "";
  }

  begin();
})();
