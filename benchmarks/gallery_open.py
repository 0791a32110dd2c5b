"""Time and memory of opening a large gallery, in a fresh process, before the first search.

python benchmarks/gallery_open.py --output benchmarks/results/gallery_open.json
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bowerbird.gallery import Gallery
from common import write_result
from gallery_common import parser, space, unit

CHILD = """
import json, sys, time
sys.path.insert(0, sys.argv[2])
start = time.perf_counter()
from bowerbird.gallery import Gallery
imported = time.perf_counter()
gallery = Gallery.open(sys.argv[1])
items = len(gallery)
opened = time.perf_counter()
from gallery_common import resident_mb, unit
memory = resident_mb()
query = unit(1, gallery.spaces()[0].dim, 1)
begin = time.perf_counter()
gallery.search(query)
searched = time.perf_counter()
print(json.dumps({"items": items, "import_s": imported - start, "open_s": opened - imported, "resident_mb": memory,
                  "first_search_s": searched - begin, "resident_after_search_mb": resident_mb(),
                  "anonymous_after_search_mb": resident_mb(anonymous=True)}))
"""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--items", type=int, default=1_000_000)
    arguments.add_argument("--repeats", type=int, default=5)
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "gallery"
        with Gallery.create(path, space("a", args.dim)) as gallery:
            for start in range(0, args.items, 100_000):
                count = min(100_000, args.items - start)
                gallery.add([f"photos/{i:08d}.jpg" for i in range(start, start + count)], unit(count, args.dim, start))
        command = [sys.executable, "-c", CHILD, str(path), str(Path(__file__).parent)]
        runs = [
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(args.repeats)
        ]
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    write_result("gallery_open", {"limit_open_s": 1.0, "limit_resident_mb": 200, **median}, out=args.output)


if __name__ == "__main__":
    main()
