"""An HTTP server with OpenAI's interface, and a page that shows at which layers tokens leave."""
