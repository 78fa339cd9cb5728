"""Which server a request goes to."""

from __future__ import annotations


class Router:
    """Requests with the same prompt, and what goes on from it, stay on one server; another prompt goes where the fewest
    tokens are outstanding.

    So the members of a group share the cache of their prompt, and a second turn finds its first.
    """

    def __init__(self, num_servers: int) -> None:
        self.outstanding = [0] * num_servers
        """Tokens that each server has yet to read and may yet sample."""
        self.sent = [0] * num_servers
        """Tokens that each was sent in all since `imbalance` was last asked for."""
        self.homes: dict[int, dict[int, int]] = {}
        """Length of a prompt -> hash of its tokens -> server."""

    def choose(self, token_ids: list[int], tokens: int, avoid: frozenset[int] = frozenset()) -> int:
        """The server of a request of `tokens` tokens in all, none of `avoid`; until `release` they are outstanding."""
        homes = self.homes  # `forget` may come from another thread
        server = _home(homes, token_ids)
        if server is None or server in avoid:
            server = min((i for i in range(len(self.outstanding)) if i not in avoid), key=self.outstanding.__getitem__)
            homes.setdefault(len(token_ids), {})[hash(tuple(token_ids))] = server
        self.outstanding[server] += tokens
        self.sent[server] += tokens
        return server

    def release(self, server: int, tokens: int) -> None:
        self.outstanding[server] -= tokens

    def imbalance(self) -> float:
        """Tokens of the busiest server over the mean of all, since this was last asked for; 1 is even."""
        sent, self.sent = self.sent, [0] * len(self.sent)
        return max(sent) * len(sent) / sum(sent) if any(sent) else 1.0

    def forget(self) -> None:
        """New weights: no server has anything in its cache."""
        self.homes = {}


def _home(homes: dict[int, dict[int, int]], token_ids: list[int]) -> int | None:
    """Server of the longest prompt that these tokens begin with."""
    for length in sorted((n for n in homes if n <= len(token_ids)), reverse=True):
        if (server := homes[length].get(hash(tuple(token_ids[:length])))) is not None:
            return server
    return None
