"""`make demo`: an invented company's FAQ over three days, learned with Holdfast and naively."""
