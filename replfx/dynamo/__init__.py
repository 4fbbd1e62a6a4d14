"""Reading Dynamo's graphs: values, modules that stand behind them, syntheses."""
