// All that the page knows of the server: two addresses of its API.

const TOKEN = "chestct-token";

export class ApiError extends Error {
  constructor(status, body, retryAfter) {
    super(body?.error?.message ?? `the server answered with status ${status}`);
    this.kind = body?.error?.type ?? "ServerError";
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export function setToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

function headers(more = {}) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { ...more, authorization: `Bearer ${token}` } : more;
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body, Number(response.headers.get("retry-after")) || 2);
}

export async function readModel() {
  const response = await fetch("/api/model", { headers: headers(), signal: AbortSignal.timeout(8000) });
  return (await checked(response)).json();
}

/** Sends one file and gives back its records one by one, each as soon as it is known. */
export async function* classify(file, name, signal) {
  const body = new FormData();
  body.append("files", file, name);
  const response = await fetch("/api/classify?images=512", {
    method: "POST",
    body,
    signal,
    headers: headers({ accept: "application/x-ndjson" }),
  });
  const reader = (await checked(response)).body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    let start = 0;
    for (let end; (end = value.indexOf("\n", start)) >= 0; start = end + 1) {
      parts.push(value.slice(start, end));
      yield JSON.parse(parts.join(""));
      parts = [];
    }
    if (start < value.length) parts.push(value.slice(start));
  }
  if (parts.length) throw new ApiError(0, { error: { message: "the answer was cut off" } }, 2);
}

/** Numbers of a picture in an answer, as the array that its kind asks for. */
export function pixelsOf(picture) {
  const text = atob(picture.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return picture.kind === "int16" ? new Int16Array(bytes.buffer) : bytes;
}
