// Pictures that are dropped while "Add" is on become items; the file's name is the id.

import { count, mebibytes } from "./dom.js";

/** What the service takes in one request, with room for the form around the pictures. */
function batches(files, { max_files: most, max_upload_bytes: bytes }) {
  const parts = [[]];
  let size = 0;
  for (const file of files) {
    const last = parts[parts.length - 1];
    if (last.length > 0 && (last.length === Math.min(most, 32) || size + file.size > bytes * 0.9)) {
      parts.push([]);
      size = 0;
    }
    parts[parts.length - 1].push(file);
    size += file.size;
  }
  return parts;
}

async function present(api, id) {
  try {
    await api.get(`/v1/item?${new URLSearchParams({ id })}`);
    return true;
  } catch (error) {
    if (error.status === 404) return false;
    throw error;
  }
}

/** Add picture files. `metadata`: of each of them. `progress(done, all)` after each request. Gives what became of them:
 *  {added, replaced, unchanged: ids, failed: {id: why}}, or null where the user does not want to replace items. */
export async function addPictures(context, files, { metadata = {}, progress = () => {} } = {}) {
  const { api, gallery } = context;
  const result = { added: [], replaced: [], unchanged: [], failed: {} };
  const fitting = files.filter((file) => {
    const fits = file.size <= gallery.max_upload_bytes * 0.9;
    if (!fits) result.failed[file.name] = `it has ${mebibytes(file.size)}; the service takes ${mebibytes(gallery.max_upload_bytes)} at a time`;
    return fits;
  });
  const there = [];
  for (const file of fitting) if (await present(api, file.name)) there.push(file.name);
  if (there.length > 0) {
    const few = there.slice(0, 5).join("\n") + (there.length > 5 ? `\nand ${there.length - 5} more` : "");
    const sure = await context.confirm({
      title: `Replace ${count(there.length, "item")}?`,
      text: `There are items with these ids already:\n${few}\n\nTheir pictures and metadata are replaced.`,
      action: "Replace",
      danger: true,
    });
    if (!sure) return null;
  }
  let done = 0;
  for (const part of batches(fitting, gallery)) {
    if (part.length === 0) continue;
    const data = new FormData();
    data.append("items", JSON.stringify(part.map((file) => ({ id: file.name, metadata }))));
    for (const file of part) data.append("files", file, file.name);
    const answer = await api.form("/v1/items?on_error=skip", data);
    for (const kind of ["added", "replaced", "unchanged"]) result[kind].push(...answer[kind]);
    Object.assign(result.failed, answer.failed);
    api.forget(part.map((file) => file.name));
    done += part.length;
    progress(done, fitting.length);
  }
  return result;
}

/** "3 added, 1 unchanged" */
export function summary({ added, replaced, unchanged, failed }) {
  const parts = [
    [added.length, "added"],
    [replaced.length, "replaced"],
    [unchanged.length, "there already"],
    [Object.keys(failed).length, "not taken"],
  ];
  return parts.filter(([n]) => n > 0).map(([n, what]) => `${n} ${what}`).join(", ") || "nothing added";
}
