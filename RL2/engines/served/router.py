"""Choose the server of each request."""

from __future__ import annotations


class Router:
    """Prefix-aware routing: requests that begin with the same prompt go to the same server.

    A new prompt goes to the server with the fewest outstanding tokens. So the members of a group share the cache of
    their prompt, and a later turn finds the cache of earlier ones.
    """

    def __init__(self, num_servers: int) -> None:
        self.outstanding = [0] * num_servers
        """Tokens that each server has yet to read or may yet sample."""
        self.sent = [0] * num_servers
        """Tokens sent to each server since the last call of `imbalance`."""
        self.homes: dict[int, dict[int, int]] = {}
        """Server by prompt: length -> hash of the tokens -> server."""

    def choose(self, token_ids: list[int], tokens: int, avoid: frozenset[int] = frozenset()) -> int:
        """Return a server, none of `avoid`, for a request of `tokens` tokens; they are outstanding until `release`."""
        homes = self.homes  # another thread may call `forget`
        server = _home(homes, token_ids)
        if server is None or server in avoid:
            server = min((i for i in range(len(self.outstanding)) if i not in avoid), key=self.outstanding.__getitem__)
            homes.setdefault(len(token_ids), {})[hash(tuple(token_ids))] = server
        self.outstanding[server] += tokens
        self.sent[server] += tokens
        return server

    def release(self, server: int, tokens: int) -> None:
        """Note that a request has ended."""
        self.outstanding[server] -= tokens

    def imbalance(self) -> float:
        """Return the tokens of the busiest server over the mean of all, since the last call; 1 is even."""
        sent, self.sent = self.sent, [0] * len(self.sent)
        return max(sent) * len(sent) / sum(sent) if any(sent) else 1.0

    def forget(self) -> None:
        """Forget all prompts, because new weights have cleared the caches."""
        self.homes = {}


def _home(homes: dict[int, dict[int, int]], token_ids: list[int]) -> int | None:
    """Return the server of the longest known prompt that these tokens begin with."""
    for length in sorted((n for n in homes if n <= len(token_ids)), reverse=True):
        if (server := homes[length].get(hash(tuple(token_ids[:length])))) is not None:
            return server
    return None
