// What every page of images is made of: unpacking its data, and pictures under the outlines of their regions.
// Enters: the compressed text that samples.py makes, and samples with a picture and outlines. Leaves: elements.
"use strict";
const pictures = (() => {
  const $ = (id) => document.getElementById(id);
  // Tiles that are shown at once, before more are asked for.
  const PAGE = 48;

  function bytes(text) {
    return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  }

  function letters(part) {
    let text = "";
    // As many as every browser takes as arguments.
    for (let k = 0; k < part.length; k += 4096) text += String.fromCharCode(...part.subarray(k, k + 4096));
    return text;
  }

  // The header, what is at a [place, length] of it, and such a place as a picture.
  async function unpack(text) {
    const stream = new Blob([bytes(text.trim())]).stream().pipeThrough(new DecompressionStream("gzip"));
    const content = new Uint8Array(await new Response(stream).arrayBuffer());
    const start = 4 + new DataView(content.buffer).getUint32(0, true);
    const data = JSON.parse(new TextDecoder().decode(content.subarray(4, start)));
    const part = ([place, length]) => content.subarray(start + place, start + place + length);
    const picture = (place) => place && `data:image/jpeg;base64,${btoa(letters(part(place)))}`;
    return { data, part, picture };
  }

  function element(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  function drawn(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  // A picture, what lies over it, and on top the outlines, in the order of the regions.
  function stack(regions, sample, ...over) {
    const [width, height] = sample.size, box = element("span", { className: "stack" });
    box.style.aspectRatio = `${width} / ${height}`;
    if (sample.image) box.append(element("img", { alt: "", src: sample.image }));
    const outlines = drawn("svg", { class: "outline", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none",
      "aria-hidden": "true" });
    sample.outlines.forEach((d, r) => {
      const { role, hue } = regions[r];
      if (!d) return;
      outlines.append(drawn("path", { d, class: `casing ${role}` }),
        drawn("path", { d, class: role, style: `--hue: var(--${hue})` }));
    });
    box.append(...over, outlines);
    return box;
  }

  // The line of a region and its name, for the legend.
  function named({ name, role, hue }) {
    const line = drawn("svg", { "aria-hidden": "true", viewBox: "0 0 26 10" }, drawn("path", { d: "M0 5H26",
      class: role, style: `stroke: var(--${hue}); stroke-width: 2` }));
    return element("span", {}, line, role ? `${name} (${role})` : name);
  }

  return { $, PAGE, unpack, element, drawn, stack, named };
})();
