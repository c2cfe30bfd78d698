"""Tests of the vLLM backend inside a real vLLM (`make test-vllm`)."""
