//! A connection whose transport is the body of an HTTP response.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::Body as RouterBody;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::connection::ConnectionGuard;

/// The body of a response on the public listener.
///
/// Not `Send`: it may refer to a connection of this shard.
pub enum ShardBody {
    /// An ordinary response.
    Router(RouterBody),
    /// The output of a session, until it ends.
    Session(ConnectionGuard),
}

impl Body for ShardBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Self::Router(body) => Pin::new(body).poll_frame(cx),
            Self::Session(guard) => guard.poll_response(cx).map(|frame| frame.map(Frame::data).map(Ok)),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Router(body) => body.is_end_stream(),
            Self::Session(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Router(body) => body.size_hint(),
            Self::Session(_) => SizeHint::default(),
        }
    }
}
