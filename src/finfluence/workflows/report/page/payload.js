// What the page shows, unpacked: an index and typed arrays, see _packing.py.

const TYPES = { float32: Float32Array, int32: Int32Array, uint32: Uint32Array, uint16: Uint16Array, uint8: Uint8Array };

async function readPayload() {
  const text = atob(document.getElementById("payload").textContent.trim());
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const index = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const start = 4 + length;
  const cache = new Map();

  function read(name) {
    const entry = index[name];
    if (!entry) return null;
    const at = start + entry.at;
    if (entry.type === "json") return JSON.parse(new TextDecoder().decode(bytes.subarray(at, at + entry.count)));
    if (entry.type === "bytes") return bytes.subarray(at, at + entry.count);
    const width = TYPES[entry.type].BYTES_PER_ELEMENT;
    const joined = new Uint8Array(entry.count * width);
    for (let plane = 0; plane < width; plane += 1) {
      const first = at + plane * entry.count;
      for (let i = 0; i < entry.count; i += 1) joined[i * width + plane] = bytes[first + i];
    }
    return new TYPES[entry.type](joined.buffer);
  }

  return (name) => {
    if (!cache.has(name)) cache.set(name, read(name));
    return cache.get(name);
  };
}
