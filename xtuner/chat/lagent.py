"""``xtuner chat --lagent``: a ReAct agent of Lagent that can search the web."""

from __future__ import annotations

import argparse
import os

from xtuner.utils.errors import UserError, Where, require
from xtuner.utils.lang import tr


def run_agent_chat(args: argparse.Namespace) -> int:
    """Answer each line with Lagent's ReAct agent, until ``exit`` or the end of the input.

    Raises:
        UserError: without Lagent or without the search's key.
    """
    require("lagent", extra="serve", purpose="--lagent")
    if not os.environ.get("SERPER_API_KEY"):
        raise UserError(
            tr("the agent's search needs a key."),
            hint=tr("get one at https://serper.dev and set SERPER_API_KEY."),
        )
    _check_code(args)
    from lagent.actions import ActionExecutor, GoogleSearch
    from lagent.agents import ReAct
    from lagent.llms import HFTransformerCasualLM

    model = HFTransformerCasualLM(args.model_name_or_path)
    agent = ReAct(
        llm=model,
        action_executor=ActionExecutor(
            actions=[GoogleSearch(api_key=os.environ["SERPER_API_KEY"])]
        ),
    )
    while True:
        try:
            question = input("user: ").strip()
        except EOFError:
            return 0
        if question.lower() == "exit":
            return 0
        if question:
            print("assistant:", getattr(agent.chat(question), "response", ""))


def _check_code(args: argparse.Namespace) -> None:
    """Refuse a model whose code Lagent would run, as it trusts every folder."""
    from xtuner.model.remote_code import IN_COMMAND, has_code

    if not args.trust_remote_code and has_code(args.model_name_or_path):
        raise UserError(
            tr("Lagent runs the code that this model brings."),
            hint=tr("if you trust it, add {consent}", consent=IN_COMMAND),
            where=Where(args.model_name_or_path),
        )
