// The samples as the page holds them: ids, categories, texts, thumbnails.

function sampleTable(read) {
  const about = read("about");
  const ids = read("ids");
  const short = read("short");
  const lengths = read("length");
  const long = read("long") ?? {};
  const longTotal = read("long_total") ?? {};
  const places = new Map((read("top") ?? []).map((code, place) => [code, place]));
  const categories = about.categories.map((name) => ({ name, values: read(`values:${name}`), codes: read(`codes:${name}`) }));
  const numbers = about.numbers.map((name) => ({ name, values: read(`number:${name}`) }));
  const thumbnails = read("thumbnails");
  const pictured = new Map((thumbnails?.rows ?? []).map((code, place) => [code, place]));

  const idOf = (code) => (typeof ids === "number" ? code : ids[code]);
  const categoryOf = (column, code) => column.values[column.codes[code]] ?? "";

  // Pixels become a canvas and encoded images an <img>; both carry a text alternative.
  function picture(code, size) {
    const place = pictured.get(code);
    if (place === undefined) return null;
    const label = `Image of sample ${idOf(code)}`;
    if (thumbnails.kind === "files") {
      const bytes = read("files").subarray(thumbnails.offsets[place], thumbnails.offsets[place + 1]);
      const type = bytes[0] === 0x89 ? "image/png" : "image/jpeg";
      const text = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
      return make("img", { class: "thumbnail", src: `data:${type};base64,${btoa(text)}`, alt: label, width: size, height: size });
    }
    const [height, width, channels] = thumbnails.shape;
    const canvas = make("canvas", { class: "thumbnail", role: "img", "aria-label": label, width, height });
    const ratio = size / Math.max(width, height);
    canvas.style.width = `${Math.round(width * ratio)}px`;
    canvas.style.height = `${Math.round(height * ratio)}px`;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const pixels = read("pixels");
    const first = place * width * height * channels;
    for (let i = 0; i < width * height; i += 1) {
      for (let c = 0; c < 3; c += 1) image.data[4 * i + c] = pixels[first + i * channels + (channels === 3 ? c : 0)];
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // Every text column of a row, as much of it as the page has, and how much there is.
  function texts(code) {
    const place = places.get(code);
    if (place !== undefined && Object.keys(long).length) {
      return about.texts
        .map((name) => ({ name, text: long[name][place] ?? "", total: longTotal[name][place] ?? 0 }))
        .filter((one) => one.total);
    }
    return short ? [{ name: about.texts[0], text: short[code], total: lengths[code] }] : [];
  }

  return {
    count: about.samples,
    categories,
    numbers,
    idOf,
    categoryOf,
    picture,
    texts,
    pictures: pictured.size > 0,
    short: short ? (code) => short[code] : null,
    isCut: (code) => short && lengths[code] > short[code].length,
    visits: read("visits"),
    searchText: (code) => `${idOf(code)} ${short ? short[code] : ""}`.toLowerCase(),
  };
}
