"""The console: a page, as it stands in the files here. It shows what the gateway tells whoever asks
with the right key, and has nothing of its own."""
