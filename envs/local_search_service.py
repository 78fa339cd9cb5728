"""Retrieval service for searchr1.py and deep_research.py on this machine: BM25 over a JSONL corpus, in memory.

    python envs/local_search_service.py --corpus corpus.jsonl --port 8000

Each line of the corpus is {"id", "contents"}; the first line of the contents is the title. Requests and replies are
those of Search-R1's service: POST /retrieve {"queries": [...], "topk": 3, "return_scores": true} returns {"result":
[[{"document": {"id", "contents"}, "score"}, ...], ...]}; without scores each result is the document alone. A line may
have the "url" of its document, too. POST /documents {"ids": ["id or url", ...]} returns {"result": [document or null,
...]}.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import re
import socket
import sys
from array import array
from collections import Counter
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

WORD = re.compile(r"\w+")
MAX_REQUEST = 1 << 20
"""Limit of a request in bytes."""
MAX_WORDS = 200
"""Number of words of a query that are used."""
MAX_TOPK = 100
MAX_QUERIES = 64
"""Limit of the queries in one request; the time of a query grows with the corpus."""


class BM25:
    """Search index by the BM25 formula of Lucene, with precomputed weights."""

    def __init__(self, texts: Iterable[str], k1: float = 0.9, b: float = 0.4) -> None:
        self.vocabulary: dict[str, int] = {}
        words, documents, counts, lengths = array("i"), array("i"), array("i"), array("i")
        for number, text in enumerate(texts):
            found = Counter(WORD.findall(text.lower()))
            lengths.append(found.total())
            words.extend(self.vocabulary.setdefault(word, len(self.vocabulary)) for word in found)
            documents.extend([number] * len(found))
            counts.extend(found.values())
        self.num_documents = len(lengths)
        # postings are ordered by word, then by document
        by_word = np.argsort(np.asarray(words), kind="stable")
        self.documents = np.asarray(documents)[by_word]
        frequency = np.bincount(np.asarray(words), minlength=len(self.vocabulary))
        self.starts = np.concatenate([[0], frequency.cumsum()])
        idf = np.log1p((self.num_documents - frequency + 0.5) / (frequency + 0.5))
        length = np.asarray(lengths) / max(1.0, float(np.mean(lengths)))
        count = np.asarray(counts)[by_word]
        saturation = count / (count + k1 * (1 - b + b * length[self.documents]))
        self.weights = (np.repeat(idf, frequency) * saturation).astype(np.float32)

    def search(self, query: str, topk: int) -> list[tuple[int, float]]:
        """Return (document, score) of the best matches, best first; documents without a query word are excluded."""
        score = np.zeros(self.num_documents, dtype=np.float32)
        for word in WORD.findall(query.lower())[:MAX_WORDS]:
            if (number := self.vocabulary.get(word)) is not None:
                postings = slice(self.starts[number], self.starts[number + 1])
                score[self.documents[postings]] += self.weights[postings]
        matches = score.nonzero()[0]
        best = matches[np.argsort(-score[matches], kind="stable")[:topk]]
        return [(int(document), float(score[document])) for document in best]


def load_corpus(path: str) -> list[dict[str, str]]:
    """Return the documents of a JSONL file. Raise ValueError, naming the line, if one is invalid."""
    documents = []
    with open(path, encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            try:
                row = json.loads(text)
                url = {"url": str(row["url"])} if row.get("url") else {}
                documents.append({"id": str(row["id"]), "contents": str(row["contents"])} | url)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {line}: expected an object with 'id' and 'contents'") from error
    if not documents:
        raise ValueError(f"{path} holds no document")
    return documents


class Service(ThreadingHTTPServer):
    """Server that answers each request in its own thread."""

    daemon_threads = True
    request_queue_size = 1024  # a whole rollout may send requests at once

    def __init__(self, address: tuple[str, int], documents: list[dict[str, str]], names: Iterable[str] = ()) -> None:
        """Serve `documents`. `names` are accepted as Host beside addresses, `localhost` and this machine's name."""
        super().__init__(address, Handler)
        self.documents = documents
        self.names = {"localhost", address[0], socket.gethostname(), *names}
        self.index = BM25(document["contents"] for document in documents)
        self.by_id = {document["url"]: document for document in reversed(documents) if "url" in document}
        self.by_id |= {document["id"]: document for document in reversed(documents)}
        self.routes = {"/retrieve": self.retrieve, "/documents": self.visit}

    def knows(self, host: str) -> bool:
        """Return whether a request's `Host` is an address or a name of the service."""
        name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in self.names
        return True

    def retrieve(self, request: Any) -> dict[str, Any]:
        """Return the reply to a request. Raise ValueError if the request is invalid."""
        if not isinstance(request, dict):
            raise ValueError("expected an object")
        queries, topk, with_scores = request.get("queries"), request.get("topk") or 3, request.get("return_scores")
        if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
            raise ValueError("'queries' must be a list of strings")
        if len(queries) > MAX_QUERIES:
            raise ValueError(f"{len(queries)} queries are more than the {MAX_QUERIES} of one request; send several")
        if not isinstance(topk, int) or not 0 < topk <= MAX_TOPK:
            raise ValueError(f"'topk' must be a number from 1 to {MAX_TOPK}")
        found = [self.index.search(query, topk) for query in queries]
        if not with_scores:
            return {"result": [[self.documents[number] for number, _ in matches] for matches in found]}
        return {
            "result": [
                [{"document": self.documents[number], "score": score} for number, score in matches] for matches in found
            ]
        }

    def visit(self, request: Any) -> dict[str, Any]:
        """Return the whole documents of a request. Raise ValueError if the request is invalid."""
        ids = request.get("ids") if isinstance(request, dict) else None
        if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
            raise ValueError("'ids' must be a list of strings")
        if len(ids) > MAX_QUERIES:
            raise ValueError(f"{len(ids)} documents are more than the {MAX_QUERIES} of one request; send several")
        return {"result": [self.by_id.get(each) for each in ids]}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print a traceback, unless the client went away before it had all of the answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"
    timeout = 60
    """Seconds after which a silent connection is closed."""

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_REQUEST:
            self.close_connection = True  # the rest is not read
            return self.reply(413, {"error": f"a request needs a Content-Length of at most {MAX_REQUEST} bytes"})
        body = self.rfile.read(int(length))
        # refuses browser pages that reach this machine under their own name (DNS rebinding)
        if not self.server.knows(self.headers.get("Host", "")):
            return self.reply(403, {"error": "the service is not known under this name; --name adds one"})
        answer = self.server.routes.get(self.path)
        if answer is None:
            return self.reply(404, {"error": "the service is at /retrieve and /documents"})
        try:
            self.reply(200, answer(json.loads(body)))
        except (ValueError, RecursionError) as error:
            self.reply(400, {"error": str(error)})

    def reply(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a rollout sends thousands of requests."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Retrieval service: BM25 over a JSONL corpus.")
    parser.add_argument("--corpus", required=True, help='JSONL file of {"id", "contents"}')
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one")
    parser.add_argument("--name", action="append", default=[], help="additional host name of this machine; repeatable")
    options = parser.parse_args()
    try:
        documents = load_corpus(options.corpus)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with Service((options.host, options.port), documents, options.name) as service:
        url = f"http://{options.host}:{service.server_port}/retrieve"
        print(f"{len(documents)} documents at {url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            service.serve_forever()


if __name__ == "__main__":
    main()
