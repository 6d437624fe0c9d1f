/** The server's routes under /mapo/ as functions. ComfyUI's `api` is handed in, so that this file does nothing alone. */

/** @param {{fetchApi: Function, apiURL: Function}} api ComfyUI's own */
export function makeServer(api) {
  const at = (name, rest = "") => `/mapo/runs/${encodeURIComponent(name)}${rest}`;

  async function ask(path, method = "GET", body = undefined) {
    const options = { method, cache: "no-store" };
    if (body !== undefined) {
      options.headers = { "Content-Type": "application/json" };
      options.body = JSON.stringify(body);
    }
    const response = await api.fetchApi(path, options);
    const answer = await response.json().catch(() => null);
    if (!response.ok) {
      const error = new Error(answer?.error ?? `ComfyUI's server answered with ${response.status}.`);
      error.status = response.status;
      throw error;
    }
    return answer;
  }

  return {
    runs: async () => (await ask("/mapo/runs")).runs,
    run: (name) => ask(at(name)),
    active: async () => (await ask("/mapo/active")).active,
    request: (name, verb) => ask(at(name, "/request"), "POST", { verb }),
    resume: (name) => ask(at(name, "/resume"), "POST", {}),
    copy: (name) => ask(at(name, "/copy"), "POST", {}),
    remove: (name) => ask(at(name), "DELETE", { confirm: name }),
    /** Address of a file of a run; `version` makes the browser look again when a picture was drawn anew. */
    fileUrl: (name, path, version = "") => {
      const file = path.split(/[/\\]/).map(encodeURIComponent).join("/");
      return api.apiURL(at(name, `/files/${file}`)) + (version === "" ? "" : `?v=${encodeURIComponent(version)}`);
    },
  };
}
