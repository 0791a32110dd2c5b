// What is looked for: the bar with text, picture and filters, and the request that it makes. The address holds the query
// (`text`, `item`, or `picture`, and `where`), so that it can be kept, shared, and walked by the browser's back button.

import { ApiError } from "./api.js";
import { button, el, failure, fill, icon, mebibytes, put, shortId } from "./dom.js";

// A picture cannot be in an address: it has a number there, and stays here as long as the page does.
const pictures = new Map();

/** Keep a picture file; gives what `picture` in the address is. */
export function remember(file) {
  const key = String(pictures.size + 1);
  pictures.set(key, { file, url: URL.createObjectURL(file) });
  return key;
}

/** The query of an address, or null: {kind, value, where, file, url}; `lost` where its picture is not here any more. */
export function queryOf(params) {
  const where = filtersOf(params);
  if (params.picture) return { kind: "image", value: params.picture, where, lost: !pictures.has(params.picture), ...pictures.get(params.picture) };
  if (params.item) return { kind: "item", value: params.item, where };
  if (params.text) return { kind: "text", value: params.text, where };
  return null;
}

/** The parameters of an address that hold a query. */
export const paramsOf = ({ picture, item, text, where }) => ({ picture, item, text, where });

/** Ask the service. `path`: "/v1/search" or "/v1/compare". */
export async function send({ api, gallery }, path, query, { k, offset = 0, signal }) {
  const where = Object.keys(query.where).length > 0 ? query.where : null;
  if (query.kind === "image") {
    // Said here: a service that refuses a body closes the connection, and then the browser cannot say why.
    if (query.file.size > gallery.max_upload_bytes) {
      throw new ApiError(413, `The picture has ${mebibytes(query.file.size)}; the service takes ${mebibytes(gallery.max_upload_bytes)}.`);
    }
    const data = new FormData();
    data.append("file", query.file, query.file.name || "picture");
    data.append("k", k);
    data.append("offset", offset);
    if (where) data.append("where", JSON.stringify(where));
    return api.form(`${path}/image`, data, { signal });
  }
  const subject = query.kind === "text" ? { text: query.value } : { id: query.value };
  return api.post(`${path}/${query.kind}`, { ...subject, k, offset, where }, { signal });
}

/** What went wrong with a query. Whoever typed a word where only ids are taken hears that. */
export function failed(context, error, query, retry) {
  const { text, image } = context.gallery.accepts;
  if (error.status !== 404 || query.kind !== "item" || text) return failure(error, retry);
  return failure({ title: `No item has the id “${query.value}”`, message: `This gallery cannot be searched by words. ${image ? "Drop a picture, or pick an item" : "Pick an item"}.` });
}

// ----------------------------------------------------------------------------------------------------- filters

/** The filters of an address; none where they cannot be read. */
export function filtersOf({ where }) {
  try {
    const found = JSON.parse(where ?? "{}");
    return found !== null && typeof found === "object" && !Array.isArray(found) ? found : {};
  } catch {
    return {};
  }
}

/** As a parameter of an address; null where there is none. */
export const whereParam = (where) => (Object.keys(where).length > 0 ? JSON.stringify(where) : null);

/** What somebody who types `value` may mean: 3 is a text or a number. The service takes a list as "any of these". */
function meanings(value) {
  if (value === "true" || value === "false") return [value, value === "true"];
  const asNumber = Number(value);
  return value.trim() !== "" && Number.isFinite(asNumber) ? [value, asNumber] : [value];
}

const valuesText = (value) => [...new Set([value].flat().map(String))].join(" or ");

// --------------------------------------------------------------------------------------------------------- bar

/** The bar. `view`: where its queries lead. `end`: further elements beside the filters. `take(files)`: what happens to
 *  chosen pictures; without it the first one is searched by. Gives {element, update, choose}. */
export function queryBar(context, { view, end = [], take = null }) {
  const accepts = context.gallery.accepts;
  const purpose = accepts.text ? "Describe what you are looking for" : "Search by the id of an item";
  const hint = accepts.image ? `${purpose}, or drop a picture` : purpose;
  const input = el("input", {
    class: "query-input",
    type: "search",
    enterkeyhint: "search",
    autocomplete: "off",
    spellcheck: "false",
    maxlength: accepts.text ? 4096 : 1024,
    "aria-label": purpose,
    "data-search-input": true,
    data: { testid: "query-text" },
  });
  const file = el("input", {
    type: "file",
    accept: "image/*",
    multiple: take !== null,
    class: "hidden-text",
    tabindex: "-1",
    "aria-hidden": "true",
    data: { testid: "query-file" },
    on: {
      change: () => {
        const files = [...file.files];
        if (files.length > 0) (take ?? (([first]) => ask({ picture: remember(first) })))(files);
        file.value = "";
      },
    },
  });
  const subject = el("div", { class: "query-subject", hidden: true });
  const chips = el("div", { class: "row", data: { testid: "filters" } });
  const filterForm = filterFields(context, (key, value) => {
    const before = filtersOf(context.params)[key];
    const values = [...new Set([...(before === undefined ? [] : [before].flat()), ...meanings(value)])];
    refine({ ...filtersOf(context.params), [key]: values.length === 1 ? values[0] : values });
  });
  const toggle = button("Filter", () => showFilters(filterForm.hidden), { kind: "ghost", symbol: "filter", "aria-expanded": "false", "data-testid": "filter-toggle" });

  function showFilters(shown) {
    filterForm.hidden = !shown;
    toggle.setAttribute("aria-expanded", String(shown));
    if (shown) filterForm.querySelector("input").focus();
  }

  const ask = (query) => context.navigate(view, { ...query, where: context.params.where });
  const refine = (where) => context.navigate(view, { ...paramsOf(context.params), where: whereParam(where) });

  const form = el(
    "form",
    {
      class: "query",
      role: "search",
      on: {
        submit: (event) => {
          event.preventDefault();
          const text = input.value.trim();
          if (text) ask(accepts.text ? { text } : { item: text });
          else if (!subject.hidden) ask(paramsOf(context.params)); // once more
          else if (accepts.image) file.click();
        },
      },
    },
    subject,
    input,
    accepts.image && button("Picture", () => file.click(), { kind: "ghost", symbol: "picture", class: "query-picture", "data-testid": "query-picture", "aria-label": "Picture", title: "Choose a picture; dropping and pasting work everywhere" }),
    el("button", { type: "submit", class: "button primary query-go", "aria-label": "Search", data: { testid: "query-go" } }, icon("search"), el("span", {}, "Search")),
    file,
  );
  const element = el("div", { class: "query-bar" }, form, el("div", { class: "row query-options" }, toggle, chips, el("span", { class: "grow" }), end), filterForm);

  function update(params) {
    const query = queryOf(params);
    // What is being typed stays; an id that was typed is the subject now.
    if (document.activeElement !== input || query?.kind !== "text") input.value = query?.kind === "text" ? query.value : "";
    subject.hidden = !query || query.kind === "text" || query.lost === true;
    input.placeholder = subject.hidden ? hint : "New search";
    fill(subject);
    if (!subject.hidden) {
      const picture = el("img", { class: "query-thumb", alt: "", on: { error: () => picture.remove() } });
      if (query.url) picture.src = query.url;
      else context.api.picture(query.value, 128).then((url) => (picture.src = url), () => picture.remove());
      const name = query.kind === "item" ? shortId(query.value) : query.file.name || "Picture";
      put(
        subject,
        picture,
        el("span", { class: "ellipsis", title: query.kind === "item" ? query.value : name, data: { testid: "query-subject" } }, name),
        el("button", { type: "button", class: "icon-button", "aria-label": "Clear", title: "Clear", data: { testid: "query-clear" }, on: { click: () => ask({}) } }, icon("close")),
      );
    }
    fill(
      chips,
      Object.entries(filtersOf(params)).map(([key, value]) =>
        el(
          "button",
          {
            type: "button",
            class: "chip removable",
            "aria-label": `Remove the filter ${key} = ${valuesText(value)}`,
            data: { testid: "filter-chip" },
            on: {
              click: () => {
                const { [key]: _, ...rest } = filtersOf(context.params);
                refine(rest);
              },
            },
          },
          el("span", { class: "muted" }, key),
          el("span", { class: "ellipsis" }, valuesText(value)),
          icon("close"),
        ),
      ),
    );
  }

  update(context.params);
  return { element, update, choose: () => file.click() };
}

/** Key and value of a filter; `add(key, value)`. */
function filterFields(context, add) {
  const keys = el("datalist", { id: "metadata-keys" }, context.gallery.metadata_keys.map((key) => el("option", { value: key })));
  const key = el("input", { class: "input", list: "metadata-keys", placeholder: context.gallery.metadata_keys[0] ?? "key", autocomplete: "off", "aria-label": "Metadata key", required: true, data: { testid: "filter-key" } });
  const value = el("input", { class: "input", placeholder: "value", autocomplete: "off", "aria-label": "Metadata value", required: true, data: { testid: "filter-value" } });
  return el(
    "form",
    {
      class: "filter-form row",
      hidden: true,
      on: {
        submit: (event) => {
          event.preventDefault();
          add(key.value.trim(), value.value);
          value.value = "";
          value.focus();
        },
      },
    },
    keys,
    key,
    el("span", { "aria-hidden": "true" }, "="),
    value,
    el("button", { type: "submit", class: "button", data: { testid: "filter-add" } }, "Add"),
  );
}
