"""EleutherAI's lm-eval on a Decoder of eval.py. Optional: pip install lm-eval.

What lm-eval asks about is prefilled, dense, but for its last token; every token that is generated
or scored is decoded, with its own choice of tokens. What does not fit in the cache loses its
beginning, as in lm-eval's own models; how many requests did is told.
"""
import functools

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm


class Harness(TemplateLM):
    """A Decoder as lm-eval wants a model: requests in, log-probabilities and texts out."""

    def __init__(self, decoder, chat=False):
        """chat: what lm-eval asks has been through the chat template, which has a BOS itself."""
        super().__init__()
        self.decoder, self.tokenizer, self.chat = decoder, decoder.tokenizer, chat
        self.size = decoder.cache.max_seq_length
        self.attended = self.decoded = self.cut = 0
        self.asked, self.answer = [], ()  # of the last one token scored: see score

    @property
    def eot_token_id(self):
        return self.decoder.model.config.eos_ids[0]

    @property
    def prefix_token_id(self):
        """What stands in front of a text without context."""
        return self.tokenizer.prefix[0] if self.tokenizer.prefix else self.eot_token_id

    @property
    def tokenizer_name(self):
        return self.tokenizer.checkpoint.name

    def chat_template(self, chat_template=False):
        return self.tokenizer.chat_template

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.chat_text(chat_history, add_generation_prompt)

    def tok_encode(self, string, add_special_tokens=None, **more):
        return self.tokenizer.encode(string, not self.chat and add_special_tokens is not False)

    def fitted(self, ids, room):
        """The last `room` token ids."""
        if room < 1:
            raise ValueError(f"a cache of {self.size} tokens is too small for this task: give a "
                             "larger --context")
        self.cut += len(ids) > room
        return ids[-room:]

    def count(self):
        """Adds what the Decoder did since its start to the sums over all requests."""
        self.attended += self.decoder.attended()
        self.decoded += self.decoder.decoded

    def score(self, context, wanted):
        """(log-probability in nats of the tokens `wanted` behind `context`, whether each is the
        likeliest)."""
        # the last of them is scored, and not decoded
        ids = self.fitted(context, self.size + 1 - len(wanted)) + wanted
        n = len(ids) - len(wanted)
        if len(wanted) > 1 or ids[:-1] != self.asked:
            self.decoder.start(ids[: n - 1])
            answer = (logits.float().log_softmax(-1)
                      for logits in self.decoder.logits(ids[n - 1 : -1]))
            # choices of one token each have the same, which is decoded once
            self.asked, self.answer = (ids[:-1], list(answer)) if len(wanted) == 1 else ([], answer)
        nats, greedy = 0.0, True
        for found in self.answer:
            targets, wanted = wanted[: len(found)], wanted[len(found) :]
            nats += found[range(len(targets)), targets].sum().item()
            greedy = greedy and found.argmax(-1).tolist() == targets
        self.count()
        return nats, greedy

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **more):
        """Requests of one context come together, so that it is prefilled once."""
        found, order = {}, sorted(range(len(requests)), key=lambda i: requests[i][1])
        for i in tqdm(order, desc="scored", unit="request", leave=False, disable=disable_tqdm):
            found[i] = self.score(*requests[i][1:])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Of whole texts, in windows as long as the cache."""
        found = []
        for request in tqdm(requests, desc="texts", leave=False, disable=disable_tqdm):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.size, 1)
            found.append(sum(self.score(*make_disjoint_window(window))[0] for window in windows))
        return found

    def generate_until(self, requests, disable_tqdm=False):
        """Greedy answers, each up to the first of the texts that end it."""
        answers = []
        for request in tqdm(requests, desc="generated", leave=False, disable=disable_tqdm):
            text, how = request.args
            if how.get("do_sample"):
                raise ValueError("the task samples its answers: only greedy ones are implemented")
            until = how.get("until") or []
            until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            n = how.get("max_gen_toks", 256)
            ids = self.fitted(self.tok_encode(text), self.size - n)
            self.decoder.start(ids[:-1])
            answer = self.decoder.greedy(ids[-1:], n, lambda said: any(x in said for x in until))
            self.count()
            for stop in until:
                answer = answer.split(stop)[0]
            answers.append(answer)
        return answers


@functools.cache
def tasks_with(include_path):
    """lm-eval's tasks and those of a directory, or None; reading them takes many seconds."""
    return TaskManager(include_path=include_path)


def run(decoder, task, limit=None, fewshot=None, chat=False, include_path=None):
    """A task, or a group of tasks, of lm-eval -> what a row says of it.

    limit: documents of each task. fewshot: examples in front, None for as many as the task says.
    include_path: a directory with more tasks. Raises ValueError for a task that there is not.
    """
    manager, model = tasks_with(include_path), Harness(decoder, chat)
    if task not in manager.all_tasks:
        raise ValueError(f"tasks={task}: no task of lm-eval {lm_eval.__version__}; give the "
                         "directory of its .yaml with --include_path")
    found = lm_eval.simple_evaluate(
        model, tasks=[task], num_fewshot=fewshot, limit=limit, bootstrap_iters=100,
        apply_chat_template=chat, task_manager=manager, log_samples=False)
    metrics, errors = {}, {}
    # a tag has no result of its own, but those of its tasks
    for name in [task] if task in found["results"] else found["results"]:
        for key, value in found["results"][name].items():
            if key == "sample_len" or not isinstance(value, (int, float)):
                continue
            key = key.removesuffix(",none") if name == task else f"{name} {key}"
            (errors if "_stderr" in key else metrics)[key.replace("_stderr", "")] = value
    n_items = sum(n["effective"] for n in found["n-samples"].values())
    return {"score": next(iter(metrics.values())), "metrics": metrics, "stderr": errors,
            "n_items": n_items, "cut": model.cut, "mean_tokens": model.attended / model.decoded,
            "lm_eval": lm_eval.__version__}
