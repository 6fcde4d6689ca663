// Asking the HTTP API. The token is kept in this tab's session storage and nowhere else.

const TOKEN_KEY = "kvstrata-token";
const TIMEOUT_MS = 15_000;

/** What went wrong with a request. `status` 0: no answer came. */
export class ApiError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(TOKEN_KEY),
  set: (value) => sessionStorage.setItem(TOKEN_KEY, value),
  forget: () => sessionStorage.removeItem(TOKEN_KEY),
};

/** Ask, and return what the JSON answer says. Statuses in `accepted` are answers too. Throws ApiError. */
export async function ask(method, path, accepted = []) {
  const headers = token.get() ? { authorization: `Bearer ${token.get()}` } : {};
  let response;
  let body;
  try {
    // Relative: behind a proxy the page may live below a path. No redirect can carry the token elsewhere.
    response = await fetch(path, {
      method,
      headers,
      cache: "no-store",
      redirect: "error",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    body = await response.text();
  } catch {
    throw new ApiError(0, "no answer");
  }
  const answer = parsed(body);
  if (response.ok || accepted.includes(response.status)) {
    if (answer === undefined) throw new ApiError(response.status, "what answered is no kvstrata server");
    return answer;
  }
  throw new ApiError(response.status, answer?.detail ?? `the server answered ${response.status}`);
}

export const get = (path) => ask("GET", path);
export const health = () => ask("GET", "health", [503]);
export const segment = (text) => encodeURIComponent(text);
export const query = (values) => new URLSearchParams(values).toString();

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
