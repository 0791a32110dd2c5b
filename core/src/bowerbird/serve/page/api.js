// The service, as the page calls it. See /openapi.json for what the paths take and give.

const KEY = "bowerbird-token";
const PICTURES = 600; // object URLs kept
const AT_ONCE = 4; // pictures fetched at a time: browsers open six connections, and searches must not wait for pictures

/** An answer that is not a 2xx. `status` is 0 where the service did not answer at all; `message` says what is wrong. */
export class ApiError extends Error {
  constructor(status, message, { title = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.title = title;
    this.retryAfter = retryAfter;
  }
}

async function problemOf(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // an error of something in between, such as a proxy
  }
  const detail = typeof body.detail === "string" ? body.detail : `The service answered ${response.status} ${response.statusText}.`;
  const seconds = Number(response.headers.get("Retry-After"));
  return new ApiError(response.status, detail, {
    title: typeof body.title === "string" ? body.title : null,
    retryAfter: Number.isFinite(seconds) && seconds > 0 ? seconds : null,
  });
}

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** `askToken(refused) -> Promise<string|null>`: asks the user for a token; `refused` where the present one is not known. */
export function createApi({ askToken }) {
  let asking = null;
  const token = () => sessionStorage.getItem(KEY);
  const setToken = (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY));

  // However many requests come back with a 401 at once, the user is asked once.
  async function authenticate(used) {
    if (token() !== used) return true; // another request has asked meanwhile
    asking ??= askToken(used !== null).finally(() => {
      asking = null;
    });
    const value = await asking;
    if (value) setToken(value);
    return Boolean(value);
  }

  /** The raw response of a 2xx. A request of a user without a token waits until one is given. */
  async function request(path, { method = "GET", body = null, headers = {}, signal = null } = {}) {
    for (;;) {
      const used = token();
      const all = { Accept: "application/json", ...headers };
      if (used) all.Authorization = `Bearer ${used}`;
      let response;
      try {
        response = await fetch(path, { method, body, headers: all, signal });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "The service does not answer. Is it still running?", { title: "No connection" });
      }
      if (response.ok) return response;
      if (response.status === 401 && (await authenticate(used))) continue;
      throw await problemOf(response);
    }
  }

  const get = async (path, { signal } = {}) => (await request(path, { signal })).json();
  const post = async (path, json, { signal } = {}) =>
    (
      await request(path, {
        method: "POST",
        body: JSON.stringify(json),
        headers: { "Content-Type": "application/json" },
        signal,
      })
    ).json();
  const form = async (path, data, { signal } = {}) => (await request(path, { method: "POST", body: data, signal })).json();

  // Pictures need the token, which an <img> cannot send: they are fetched, and shown by an object URL.
  const pictures = new Map(); // "size id" -> promise of an object URL, the one used last at the end
  const waiting = [];
  let fetching = 0;

  async function fetchPicture(id, size) {
    const path = `/v1/thumbnail?${new URLSearchParams({ id, size })}`;
    for (let attempt = 0; ; attempt += 1) {
      try {
        return URL.createObjectURL(await (await request(path, { headers: { Accept: "image/*" } })).blob());
      } catch (error) {
        if (![429, 503].includes(error.status) || attempt === 4) throw error;
        await sleep(1000 * Math.min(error.retryAfter ?? 1, 5) * (1 + attempt));
      }
    }
  }

  function next() {
    while (fetching < AT_ONCE && waiting.length > 0) {
      const { id, size, resolve, reject } = waiting.shift();
      fetching += 1;
      fetchPicture(id, size)
        .then(resolve, reject)
        .finally(() => {
          fetching -= 1;
          next();
        });
    }
  }

  /** Object URL of an item's picture, `size` pixels on its longer side (64 to 512). Rejects with an ApiError. */
  function picture(id, size = 256) {
    const key = `${size} ${id}`;
    let found = pictures.get(key);
    if (found) {
      pictures.delete(key);
    } else {
      found = new Promise((resolve, reject) => waiting.push({ id, size, resolve, reject }));
      found.catch(() => pictures.delete(key));
      next();
    }
    pictures.set(key, found);
    if (pictures.size > PICTURES) {
      const [oldest, url] = pictures.entries().next().value;
      pictures.delete(oldest);
      url.then(URL.revokeObjectURL, () => {});
    }
    return found;
  }

  /** Forget the pictures of these items: they have others now. */
  function forget(ids) {
    const gone = new Set(ids);
    for (const [key, url] of pictures) {
      if (!gone.has(key.slice(key.indexOf(" ") + 1))) continue;
      pictures.delete(key);
      url.then(URL.revokeObjectURL, () => {});
    }
  }

  /** Follow /v1/events; `handlers`: {gallery(info), upgrade(view), live(bool)}. Connects again by itself. Returns close().
   *  Not an EventSource: that one cannot send a token. */
  function events(handlers) {
    const stop = new AbortController();

    async function follow() {
      const response = await request("/v1/events", { headers: { Accept: "text/event-stream" }, signal: stop.signal });
      handlers.live?.(true);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        text = (text + value).replaceAll("\r\n", "\n");
        const blocks = text.split("\n\n");
        text = blocks.pop();
        for (const block of blocks) dispatch(block);
      }
    }

    function dispatch(block) {
      let event = "message";
      const data = [];
      for (const line of block.split("\n")) {
        const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
        if (field === "event") event = value;
        else if (field === "data") data.push(value);
      }
      if (data.length > 0) handlers[event]?.(JSON.parse(data.join("\n")));
    }

    (async () => {
      for (let pause = 500; !stop.signal.aborted; pause = Math.min(2 * pause, 10_000)) {
        const begun = performance.now();
        try {
          await follow();
        } catch (error) {
          if (error.name !== "AbortError") console.info("The stream of events ended:", error.message);
          if (error.status === 401 || error.status === 403) pause = 10_000;
        }
        if (stop.signal.aborted) return;
        handlers.live?.(false);
        if (performance.now() - begun > 10_000) pause = 500;
        await sleep(pause);
      }
    })();
    return () => stop.abort();
  }

  return { get, post, form, picture, forget, events, token, setToken };
}
