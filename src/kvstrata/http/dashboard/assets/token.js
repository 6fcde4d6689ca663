// The token: typed in by the user, kept in this tab's session storage.

import { token } from "./api.js";
import { byId, say } from "./dom.js";

let afterwards = null;

/** Wire the dialog; `changed` is called when there is another token, or none any more. */
export function startToken(changed) {
  const dialog = byId("token-dialog");
  byId("token").addEventListener("click", () => askToken("", null));
  byId("token-cancel").addEventListener("click", () => dialog.close());
  byId("token-forget").addEventListener("click", () => {
    token.forget();
    dialog.close();
    label();
    changed();
  });
  byId("token-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const value = byId("token-value").value.trim();
    const then = afterwards;
    if (value) token.set(value);
    dialog.close();
    label();
    await changed();
    if (value) then?.();
  });
  dialog.addEventListener("close", () => {
    byId("token-value").value = "";
    afterwards = null;
  });
  label();
  if (token.get()) byId("links").hidden = true; // a link carries no token
}

/** Open the dialog. `then` is called once a token was given. */
export function askToken(why, then) {
  const dialog = byId("token-dialog");
  const refused = token.get() ? "The token that was given was refused, or is not this server's. " : "";
  say(byId("token-why"), why ? refused + why : "Servers that others can reach want one, for all or for changes.");
  byId("token-forget").hidden = !token.get();
  if (dialog.open) return;
  dialog.showModal();
  afterwards = then;
  byId("token-value").focus();
}

function label() {
  say(byId("token"), token.get() ? "Token ✓" : "Token");
  byId("token").setAttribute("aria-label", token.get() ? "Token: given" : "Token: none given");
}
