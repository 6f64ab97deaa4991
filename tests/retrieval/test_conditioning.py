"""Conditioning of retrieval-augmented models."""

from __future__ import annotations

import torch

from ldm.retrieval.conditioning import retrieval_conditioning, unconditional_conditioning


def test_prompt_comes_first_and_vectors_have_unit_length():
    prompts = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    neighbours = torch.tensor([[[5.0, 0.0], [0.0, 0.1]], [[6.0, 8.0], [1.0, 0.0]]])
    context = retrieval_conditioning(prompts, neighbours)
    expected = torch.tensor([[[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.6, 0.8], [1.0, 0.0]]])
    assert torch.allclose(context, expected)


def test_context_without_neighbours_has_length_one():
    assert torch.allclose(retrieval_conditioning(torch.tensor([[3.0, 4.0]])), torch.tensor([[[0.6, 0.8]]]))


def test_dtype_is_that_of_the_prompts():
    context = retrieval_conditioning(torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 3, 2))
    assert context.dtype == torch.float64 and context.shape == (1, 4, 2)


def test_unconditional_context_is_zeros():
    context = torch.ones(2, 3, 4, dtype=torch.float16)
    zeros = unconditional_conditioning(context)
    assert zeros.shape == context.shape and zeros.dtype == context.dtype and not zeros.any()
