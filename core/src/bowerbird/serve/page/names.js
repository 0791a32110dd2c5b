// What spaces, strategies and mergers are called on the page.

/** "rank-merge" for "compat:rank-merge" */
export const short = (name) => (name ? name.slice(name.indexOf(":") + 1) || name : "");

/** A short name for each space by its fingerprint: its encoder without what all have in common, and with digits of the
 *  fingerprint where that is not enough. */
export function spaceNames(spaces) {
  const encoders = spaces.map((space) => space.encoder.replace(/^lifted:/, ""));
  let common = "";
  if (new Set(encoders).size > 1) {
    const first = encoders[0];
    let same = 0;
    while (same < first.length && encoders.every((name) => name[same] === first[same])) same += 1;
    common = first.slice(0, same);
  }
  const cut = Math.max(...["/", "?", "&", ":"].map((mark) => common.lastIndexOf(mark)), -1) + 1;
  const names = spaces.map((space, place) => (space.lifted ? "lifted " : "") + (encoders[place].slice(cut) || encoders[place]));
  return new Map(
    spaces.map((space, place) => {
      const twice = names.filter((name) => name === names[place]).length > 1;
      return [space.fingerprint, twice ? `${names[place]} ${space.fingerprint.slice(0, 6)}` : names[place]];
    }),
  );
}

/** A line of a plan: "rank-merge, merger zscore" */
export const lineName = (line) => short(line.strategy) + (line.merger ? `, merger ${short(line.merger)}` : "");
