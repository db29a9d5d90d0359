"""Give texts vectors by sentence-transformers alone: python reload_sentences.py FOLDER TEXTS VECTORS DEVICE

Started in a process of its own and not importing lora_lab, so that it sees what a deployment would see.

FOLDER: that sentence-transformers loads. TEXTS: JSON of `texts`, and for each in `queries` whether it is a query. VECTORS: safetensors
that is written, with `vectors` [texts, D] float32.
"""

import json
import sys
from pathlib import Path


def main(folder: str, texts_file: str, vectors_file: str, device: str) -> None:
    import torch
    from safetensors.torch import save_file
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device=device, local_files_only=True, trust_remote_code=False)
    given = json.loads(Path(texts_file).read_text(encoding="utf-8"))
    found = torch.empty(0)
    for is_query, encode in ((True, model.encode_query), (False, model.encode_document)):
        places = [place for place, query in enumerate(given["queries"]) if query == is_query]
        if not places:
            continue
        texts = [given["texts"][place] for place in places]
        vectors = encode(texts, convert_to_tensor=True, show_progress_bar=False).float().cpu()
        if not len(found):
            found = torch.empty(len(given["texts"]), vectors.shape[1])
        found[places] = vectors
    save_file({"vectors": found}, vectors_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
