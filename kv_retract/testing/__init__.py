"""Public conformance kit: what every engine, eraser, policy and prefix cache must pass.

Subclass a suite in a pytest module and give it the object under test, as with `langchain-tests`:

    class TestMyEraser(EraserConformance):
        @pytest.fixture
        def eraser(self):
            return MyEraser()
"""
