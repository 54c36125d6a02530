def instrument(span_name):
    return lambda function: function
