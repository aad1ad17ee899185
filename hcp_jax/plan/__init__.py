"""From outside: what will this run cost, and what will the compiler make of it?"""
