/* The state of the page as text for its address: JSON, deflated, in the alphabet of addresses. */
const through = async (data, transform) =>
  new Response(new Blob([data]).stream().pipeThrough(transform));

export const pack = async (state) => {
  const packed = await through(JSON.stringify(state), new CompressionStream("deflate-raw"));
  const bytes = new Uint8Array(await packed.arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""))
    .replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
};

/* Rejects for text that `pack` did not write. */
export const unpack = async (text) => {
  const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")),
    (character) => character.charCodeAt(0));
  return (await through(bytes, new DecompressionStream("deflate-raw"))).json();
};
