/* The server's HTTP interface. Everything that fails is an Error with one sentence for people. */
const GONE = "The server does not answer. Is pvec serve still running?";
const KEY = "pvec-key"; // in this tab only

const lost = (error) => {
  throw error.name === "AbortError" ? error : new Error(GONE);
};

export const useKey = (key) => sessionStorage.setItem(KEY, key);

/* Throws with `status` where the server said no. */
export const request = async (path, body, signal) => {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(body && { "Content-Type": "application/json" }),
    ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, signal,
    cache: "no-store", body: body && JSON.stringify(body) }).catch(lost);
  if (response.ok) return response;
  const reply = await response.json().catch(() => null);
  const message = response.status === 401 ? "This server needs its API key."
    : reply?.error?.message || `The server answered with status ${response.status}.`;
  throw Object.assign(new Error(message), { status: response.status });
};

/* Yields the events of a streamed answer; one that ends without [DONE] is not whole. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    if (done) throw new Error(GONE);
    text += value;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = JSON.parse(data);
      if (event.error) throw Object.assign(new Error(event.error.message), { status: 500 });
      yield event;
    }
  }
}
