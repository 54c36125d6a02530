import logging


def init_logger(name):
    logger = logging.getLogger(name)
    logger.info_once = logger.info
    return logger
